//! Memory straight from the system.

/// `count` times `value`, in huge pages where the system offers them: a decode step streams through
/// all weights, and with pages of 4 KiB the walks of the page table cost a tenth of it or more.
pub(crate) fn huge_vec<T: Copy>(value: T, count: usize) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    #[cfg(target_os = "linux")]
    advise_huge_pages(values.as_ptr(), values.capacity() * size_of::<T>());
    values.resize(count, value);
    values
}
