//! An idle pool uses no CPU. In a test binary of its own, because it measures the whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::thread::sleep;
use std::time::Duration;

use spate_cpu::ThreadPool;

#[test]
fn parked_workers_use_no_cpu() {
    let pool = ThreadPool::new(4).unwrap();
    pool.run(16, |_| sleep(Duration::from_millis(1)));
    sleep(Duration::from_millis(20));
    let before = cpu_ticks();
    sleep(Duration::from_millis(300));
    let used = cpu_ticks() - before;
    // Three spinning workers would use 30 ticks or more on one core.
    assert!(
        used <= 2,
        "parked workers used {used} ticks of 10 ms in 300 ms"
    );
    drop(pool);
}

/// User and system time of this process, in ticks of 10 ms.
fn cpu_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // The second field, the name in parentheses, may contain spaces.
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
