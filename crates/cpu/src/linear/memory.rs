/// `count` times `value`, in huge pages where the system offers them: a decode step streams through
/// all weights, and with pages of 4 KiB the walks of the page table cost a tenth of it or more.
pub(super) fn huge_vec<T: Copy>(value: T, count: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    advise_huge_pages(values.as_ptr(), count);
    values.resize(count, value);
    values
}

/// Must come before the memory is touched. A wish only: whether it is granted does not matter.
#[cfg(not(target_os = "linux"))]
pub(crate) fn advise_huge_pages<T>(_start: *const T, _count: usize) {}

/// Must come before the memory is touched. A wish only: whether it is granted does not matter.
#[cfg(target_os = "linux")]
pub(crate) fn advise_huge_pages<T>(start: *const T, count: usize) {
    const PAGE: usize = 4096;
    let (start, bytes) = (start.cast::<u8>(), count * size_of::<T>());
    let skip = start.align_offset(PAGE);
    if bytes > skip + PAGE {
        let whole_pages = (bytes - skip) / PAGE * PAGE;
        // SAFETY: the advice changes no content, whoever has the memory. An error (no such pages,
        // or a page size other than assumed) leaves everything as it was.
        unsafe {
            let start = start.wrapping_add(skip).cast_mut();
            libc::madvise(start.cast(), whole_pages, libc::MADV_HUGEPAGE);
        }
    }
}
