//! How much memory this process may still take.

use std::path::Path;

/// Bytes that can be taken without swapping: what the system has, or what the control group leaves.
/// `None` where neither says.
pub(crate) fn available() -> Option<u64> {
    let system = meminfo("MemAvailable");
    let group = read("/proc/self/cgroup").and_then(|text| {
        let directory = Path::new("/sys/fs/cgroup").join(own_group(&text)?);
        let read = |name: &str| std::fs::read_to_string(directory.join(name)).ok();
        group_available(
            &read("memory.max")?,
            &read("memory.current")?,
            &read("memory.stat")?,
        )
    });
    [system, group].into_iter().flatten().min()
}

/// Bytes of a line of `/proc/meminfo`.
pub(crate) fn meminfo(name: &str) -> Option<u64> {
    meminfo_line(&read("/proc/meminfo")?, name)
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

fn meminfo_line(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines();
    let kib = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = kib.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Of `0::/a/b` (control groups, version 2) the path below their root.
fn own_group(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::/"))
}

/// `None` without a limit. Cached files that nobody is using count as free: the group drops them first.
fn group_available(max: &str, current: &str, stat: &str) -> Option<u64> {
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let cached = stat.lines().find_map(|l| l.strip_prefix("inactive_file "));
    let cached = cached.and_then(|n| n.parse().ok()).unwrap_or(0);
    Some(max.saturating_sub(current.saturating_sub(cached)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_says() {
        let text = "MemTotal:       24085508 kB\nMemAvailable:   21000000 kB\n";
        assert_eq!(meminfo_line(text, "MemAvailable"), Some(21_000_000 << 10));
        assert_eq!(meminfo_line(text, "Mem"), None);
        assert_eq!(own_group("0::/user.slice/x\n"), Some("user.slice/x"));
        assert_eq!(own_group("4:memory:/x\n"), None);
        let stat = "anon 1\ninactive_file 30\n";
        assert_eq!(group_available("100\n", "80\n", stat), Some(50));
        assert_eq!(group_available("100\n", "200\n", ""), Some(0));
        assert_eq!(group_available("max\n", "80\n", stat), None);
    }
}
