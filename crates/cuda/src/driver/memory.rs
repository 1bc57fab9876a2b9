use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic;

use cudarc::driver::sys::{self, CUdeviceptr};

use super::Device;
use crate::CudaError;
use crate::error::Check;

/// Alignment of everything in an [`Arena`]: a whole DRAM burst, and more than any vector load or
/// tensor map asks for.
const ALIGN: u64 = 256;

/// Types that mean the same on both sides: any bits are a value, and none is a pointer.
///
/// # Safety
/// Exactly that, with the layout of C.
pub unsafe trait Plain: Copy + Send + 'static {}

macro_rules! plain {
    ($($t:ty)+) => { $(
        // SAFETY: a number.
        unsafe impl Plain for $t {}
    )+ };
}
plain!(u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 half::bf16 half::f16);

/// A stretch of GPU memory, `len` elements. It borrows nothing: whoever uses it sees to it that its
/// [`Arena`] is alive.
#[derive(Debug)]
pub struct Slice<T> {
    address: CUdeviceptr,
    len: usize,
    element: PhantomData<*const T>,
}

impl<T> Clone for Slice<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Slice<T> {}
// SAFETY: an address and a length; access goes through the driver.
unsafe impl<T: Send> Send for Slice<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Slice<T> {}

impl<T> Slice<T> {
    /// No memory; kernels see a null pointer.
    pub const fn null() -> Self {
        Self {
            address: 0,
            len: 0,
            element: PhantomData,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Address on the GPU.
    pub fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn address_ref(&self) -> &CUdeviceptr {
        &self.address
    }

    /// A part of it.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn range(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {} elements",
            self.len
        );
        Self {
            address: self.address + (range.start * size_of::<T>()) as u64,
            len: range.end - range.start,
            element: PhantomData,
        }
    }

    /// The same bytes as elements of another type; the rest of the last element is left out.
    pub fn cast<U>(&self) -> Slice<U> {
        Slice {
            address: self.address,
            len: self.bytes() / size_of::<U>(),
            element: PhantomData,
        }
    }
}

/// GPU memory that is taken once, at start, and handed out piece by piece until it is dropped whole.
pub struct Arena {
    device: Device,
    base: CUdeviceptr,
    size: u64,
    used: u64,
}

impl Arena {
    /// Takes `bytes` of GPU memory for a purpose that error messages name.
    ///
    /// # Errors
    /// When the GPU has no room.
    pub fn new(device: &Device, what: &'static str, bytes: u64) -> Result<Self, CudaError> {
        let free = device.free_bytes()?;
        let size = bytes.next_multiple_of(ALIGN).max(ALIGN);
        let mut base = 0;
        // SAFETY: a context is bound (by `free_bytes`); the pointer is to a live local.
        let status = unsafe { sys::cuMemAlloc_v2(&raw mut base, size as usize) };
        if status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let bytes = size;
            return Err(CudaError::OutOfMemory { what, bytes, free });
        }
        status.check("taking GPU memory")?;
        Ok(Self {
            device: device.clone(),
            base,
            size,
            used: 0,
        })
    }

    /// Hands out memory for `len` elements, with undefined contents.
    ///
    /// # Errors
    /// When the arena is used up: it was planned too small.
    pub fn take<T: Plain>(&mut self, len: usize) -> Result<Slice<T>, CudaError> {
        let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
        let end = bytes.checked_next_multiple_of(ALIGN);
        let end = end.and_then(|bytes| self.used.checked_add(bytes));
        let Some(end) = end.filter(|&end| end <= self.size) else {
            return Err(CudaError::OutOfMemory {
                what: "a buffer beyond its arena",
                bytes,
                free: self.size - self.used,
            });
        };
        let address = self.base + self.used;
        self.used = end;
        Ok(Slice {
            address,
            len,
            element: PhantomData,
        })
    }

    /// Bytes that [`take`](Self::take) would need for `len` elements.
    pub fn room_for<T>(len: usize) -> u64 {
        ((len * size_of::<T>()) as u64).next_multiple_of(ALIGN)
    }

    /// Takes everything back that was handed out: what is left of it must not be used any more.
    pub fn reset(&mut self) {
        self.used = 0;
    }

    /// All of it.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What was handed out.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Everything, handed out or not.
    pub fn whole(&self) -> Slice<u8> {
        Slice {
            address: self.base,
            len: self.size as usize,
            element: PhantomData,
        }
    }

    /// The device it lies on.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Errors of a lost context change nothing any more.
        let _ = self.device.bind();
        // SAFETY: allocated in `new`. The driver waits for kernels that still run.
        let _ = unsafe { sys::cuMemFree_v2(self.base) };
    }
}

/// Page-locked host memory, which the GPU copies from and to without the CPU.
pub struct Pinned<T: Plain> {
    device: Device,
    data: *mut T,
    len: usize,
}

// SAFETY: it owns its memory.
unsafe impl<T: Plain> Send for Pinned<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Plain + Sync> Sync for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    /// Memory for `len` elements, all zero.
    ///
    /// # Errors
    /// When the system can't lock so many pages.
    pub fn new(device: &Device, len: usize) -> Result<Self, CudaError> {
        device.bind()?;
        let bytes = (len * size_of::<T>()).max(1);
        let mut data: *mut c_void = std::ptr::null_mut();
        // Not write-combined: the CPU reads results from it.
        // SAFETY: a context is bound; the pointer is to a live local.
        unsafe { sys::cuMemHostAlloc(&raw mut data, bytes, 0) }
            .check("locking host memory for copies")?;
        // SAFETY: just allocated with this size.
        unsafe { data.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self {
            device: device.clone(),
            data: data.cast(),
            len,
        })
    }

    /// The same memory as kernels see it, over the bus.
    pub fn mapped(&self) -> Slice<T> {
        // With unified addressing, as on every 64-bit system, an address is the same on both sides.
        Slice {
            address: self.data as CUdeviceptr,
            len: self.len,
            element: PhantomData,
        }
    }
}

impl Pinned<u8> {
    /// `len` elements of another type, from a byte on.
    ///
    /// # Panics
    /// If they are not inside or not aligned.
    pub fn elements<T: Plain>(&self, at: usize, len: usize) -> &[T] {
        let bytes = &self[at..at + len * size_of::<T>()];
        assert!(bytes.as_ptr().cast::<T>().is_aligned());
        // SAFETY: inside, aligned and initialised; any bits are a value.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), len) }
    }

    /// Writes an element of another type that a kernel may be reading meanwhile, after all that was written
    /// before.
    ///
    /// # Panics
    /// If it is not inside or not aligned.
    pub fn poke<T: Plain>(&mut self, at: usize, value: T) {
        let inside = at.checked_add(size_of::<T>());
        assert!(inside.is_some_and(|end| end <= self.len));
        // SAFETY: inside the allocation.
        let to = unsafe { self.data.add(at) }.cast::<T>();
        assert!(to.is_aligned());
        atomic::fence(atomic::Ordering::Release);
        // SAFETY: inside and aligned.
        unsafe { to.write_volatile(value) };
    }

    /// An element of another type that a kernel may be writing meanwhile, as it is now.
    ///
    /// # Panics
    /// If it is not inside or not aligned.
    pub fn peek<T: Plain>(&self, at: usize) -> T {
        let inside = at.checked_add(size_of::<T>());
        assert!(inside.is_some_and(|end| end <= self.len));
        // SAFETY: inside the allocation.
        let from = unsafe { self.data.add(at) }.cast::<T>();
        assert!(from.is_aligned());
        // SAFETY: aligned and initialised; any bits are a value.
        let value = unsafe { from.read_volatile() };
        // What was written before it is seen after it.
        atomic::fence(atomic::Ordering::Acquire);
        value
    }
}

impl<T: Plain> Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: allocated with room for `len` elements, page-aligned, and initialised; any bits
        // are a value.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }
}

impl<T: Plain> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T: Plain> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: allocated in `new`.
        let _ = unsafe { sys::cuMemFreeHost(self.data.cast()) };
    }
}
