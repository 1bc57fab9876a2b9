use std::ffi::{CStr, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::sys;

use super::Device;
use crate::CudaError;
use crate::error::Check;

/// A compiled `.cu` file that is part of the program.
#[derive(Debug, Clone, Copy)]
pub struct Image {
    /// Its name below `kernels/`, without the ending.
    pub name: &'static str,
    /// A fatbin: machine code for several architectures.
    pub bytes: &'static [u8],
}

/// A loaded image.
#[derive(Clone)]
pub struct Module(Arc<Inner>);

struct Inner {
    device: Device,
    library: sys::CUlibrary,
    name: &'static str,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Inner {}

impl Module {
    /// Loads an image, which takes about 0.3 ms where it holds machine code for this GPU, and as long as
    /// its compilation where it holds PTX only.
    ///
    /// # Errors
    /// When it has no code that this GPU can run.
    pub fn load(device: &Device, image: &Image) -> Result<Self, CudaError> {
        device.bind()?;
        // The driver reads the image as 8-byte words; embedded bytes are aligned to 1.
        let mut aligned = vec![0u64; image.bytes.len().div_ceil(8)];
        let to = aligned.as_mut_ptr().cast::<u8>();
        // SAFETY: `aligned` has room for all the bytes and can't overlap a static.
        unsafe { to.copy_from_nonoverlapping(image.bytes.as_ptr(), image.bytes.len()) };
        let (mut library, none) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the image is a fatbin, which says its own length; without options the driver
        // copies what it keeps.
        unsafe {
            sys::cuLibraryLoadData(
                &raw mut library,
                aligned.as_ptr().cast::<c_void>(),
                none,
                none.cast(),
                0,
                none.cast(),
                none.cast(),
                0,
            )
        }
        .check("loading a kernel image")?;
        Ok(Self(Arc::new(Inner {
            device: device.clone(),
            library,
            name: image.name,
        })))
    }

    /// Finds a kernel by its C name.
    ///
    /// # Errors
    /// When the image has no such kernel.
    pub fn kernel(&self, entry: &CStr) -> Result<Kernel, CudaError> {
        let Inner {
            device, library, ..
        } = &*self.0;
        device.bind()?;
        let (mut kernel, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the library is loaded; the pointers are to live locals. Asking for the function
        // loads it now: it could not be loaded while a graph is captured.
        unsafe {
            sys::cuLibraryGetKernel(&raw mut kernel, *library, entry.as_ptr())
                .check("finding a kernel")?;
            sys::cuKernelGetFunction(&raw mut function, kernel).check("loading a kernel")?;
        }
        Ok(Kernel {
            module: self.clone(),
            function,
        })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: loaded in `load`; kernels keep the module alive. Errors of a lost context change
        // nothing any more.
        let _ = unsafe { sys::cuLibraryUnload(self.library) };
    }
}

/// A function that runs on the GPU.
#[derive(Clone)]
pub struct Kernel {
    module: Module,
    pub(super) function: sys::CUfunction,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    /// Lets it use more than 48 KiB of dynamic shared memory.
    ///
    /// # Errors
    /// When the GPU has less.
    pub fn allow_shared_bytes(&self, bytes: u32) -> Result<(), CudaError> {
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        self.device().bind()?;
        // SAFETY: the function is loaded.
        unsafe { sys::cuFuncSetAttribute(self.function, which, bytes as c_int) }
            .check("raising a kernel's shared memory")
    }

    /// The device it runs on.
    pub fn device(&self) -> &Device {
        &self.module.0.device
    }

    /// Name of the file it comes from.
    pub fn file(&self) -> &'static str {
        self.module.0.name
    }
}
