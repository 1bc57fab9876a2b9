use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use super::line::KvLine;
use crate::CpuError;
use crate::linear::advise_huge_pages;

/// Lines of zeros straight from the system, in huge pages where it offers them; a page takes up
/// memory only once it is written to. (An allocator may reuse memory and clears it then, which
/// touches every page.)
pub(super) struct ZeroPages<C> {
    start: NonNull<C>,
    len: usize,
}

// SAFETY: it owns its lines, like a box.
unsafe impl<C: Send> Send for ZeroPages<C> {}
// SAFETY: as above.
unsafe impl<C: Sync> Sync for ZeroPages<C> {}

impl<C: KvLine> ZeroPages<C> {
    pub(super) fn new(len: usize) -> Result<Self, CpuError> {
        let bytes = len.saturating_mul(size_of::<C>());
        let mut start = NonNull::dangling();
        if bytes > 0 {
            // SAFETY: a new mapping, which nothing else refers to.
            let mapped = unsafe {
                libc::mmap(
                    ptr::null_mut(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            start = match NonNull::new(mapped) {
                Some(mapped) if mapped.as_ptr() != libc::MAP_FAILED => {
                    advise_huge_pages(mapped.as_ptr().cast::<u8>().cast_const(), bytes);
                    mapped.cast()
                }
                _ => {
                    let what = "the KV cache";
                    return Err(CpuError::OutOfMemory { what, bytes });
                }
            };
        }
        Ok(Self { start, len })
    }
}

impl<C> Drop for ZeroPages<C> {
    fn drop(&mut self) {
        let bytes = self.len * size_of::<C>();
        if bytes > 0 {
            // SAFETY: the whole mapping of `new`; lines have nothing to drop. It can't fail: the
            // range is valid.
            unsafe { libc::munmap(self.start.as_ptr().cast(), bytes) };
        }
    }
}

impl<C> Deref for ZeroPages<C> {
    type Target = [C];

    fn deref(&self) -> &[C] {
        // SAFETY: `new` mapped `len` lines, page-aligned; zeros are a value of any KvLine. Of no
        // lines the pointer is dangling, which is as it should be.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<C> DerefMut for ZeroPages<C> {
    fn deref_mut(&mut self) -> &mut [C] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
