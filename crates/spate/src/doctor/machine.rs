//! The machine around the GPU: processors, memory, pages.

use crate::memory;
use crate::settings::units::format_size;

/// Processors and memory in a line each.
pub(super) fn describe() -> Vec<(&'static str, String)> {
    let mut lines = vec![("processor", processor())];
    let total = memory::meminfo("MemTotal").map(format_size);
    let available = memory::available().map(format_size);
    let cached = memory::meminfo("Cached").map(format_size);
    let unknown = || "unknown".to_owned();
    lines.push((
        "memory",
        format!(
            "{}, {} available to this process, {} in the page cache",
            total.unwrap_or_else(unknown),
            available.unwrap_or_else(unknown),
            cached.unwrap_or_else(unknown)
        ),
    ));
    lines.push(("huge pages", huge_pages()));
    lines
}

fn processor() -> String {
    let name = std::fs::read_to_string("/proc/cpuinfo").ok();
    let name = name.as_deref().and_then(model_name);
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{}, {count} for this process, {}",
        name.unwrap_or("unknown"),
        spate_cpu::linear::Isa::best().name()
    )
}

fn model_name(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

/// Whether the kernel gives large pages to programs that ask: weights on a CPU are read faster so.
fn huge_pages() -> String {
    const FILE: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    let text = std::fs::read_to_string(FILE).unwrap_or_default();
    match chosen(&text) {
        Some("never") => {
            "never: weights on the CPU are read more slowly (madvise would do)".to_owned()
        }
        Some(mode) => mode.to_owned(),
        None => "unknown".to_owned(),
    }
}

/// The one in brackets of `always [madvise] never`.
fn chosen(modes: &str) -> Option<&str> {
    Some(modes.split_once('[')?.1.split_once(']')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says() {
        assert_eq!(chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(chosen(""), None);
        let cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t: x\n";
        assert_eq!(model_name(cpuinfo), Some("Some CPU @ 2 GHz"));
        assert_eq!(model_name(""), None);
    }
}
