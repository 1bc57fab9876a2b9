//! A fixed pool of threads for the loops inside one step.
//!
//! A decode step of a small model is some hundred parallel loops of a few microseconds each, so
//! workers spin for a moment between loops; then they park, and an idle daemon uses no CPU. The
//! caller always works too and never waits for a worker that has not started: a loop that is over
//! before a worker woke up is simply finished without it.

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long a thread spins before it parks: longer than the serial work between two loops of a
/// step, far shorter than anybody would notice on a CPU meter.
const SPIN: Duration = Duration::from_micros(40);

/// [`Shared::state`]: the number of workers inside the loop …
const ACTIVE: u64 = 0xffff;
/// … workers may join it …
const OPEN: u64 = 1 << 16;
/// … workers shall end …
const SHUTDOWN: u64 = 1 << 17;
/// … and above it the loop's number, so that a worker joins each loop once.
const EPOCH_SHIFT: u32 = 32;

/// Threads that share the iterations of a loop.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a loop runs on the workers.
    caller: Mutex<()>,
}

struct Shared {
    state: AtomicU64,
    /// Written by the caller while no worker is active and the state is not open; read by active workers.
    job: UnsafeCell<Option<Job>>,
    /// The next iteration to hand out.
    next: AtomicUsize,
    /// The first panic of an iteration.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone)]
struct Job {
    body: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    caller: Thread,
}

// SAFETY: `job` is the only field that is not Sync by itself; its comment says who may touch it
// when, and the acquire/release operations on `state` order those accesses. The body is Sync.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is used only while the loop that it belongs to is running.
unsafe impl Send for Shared {}

impl ThreadPool {
    /// A pool in which `threads` threads work, the caller among them; 0 means as many as the
    /// process may use (its CPU affinity and cgroup quota).
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn new(threads: usize) -> io::Result<Self> {
        let threads = match threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let workers = threads.min(ACTIVE as usize) - 1;
        let mut pool = Self {
            shared: Arc::new(Shared {
                state: AtomicU64::new(0),
                job: UnsafeCell::new(None),
                next: AtomicUsize::new(0),
                panic: Mutex::new(None),
            }),
            workers: Vec::with_capacity(workers),
            caller: Mutex::new(()),
        };
        for i in 1..=workers {
            let shared = Arc::clone(&pool.shared);
            let name = format!("spate-cpu-{i}");
            pool.workers.push(
                thread::Builder::new()
                    .name(name)
                    .spawn(move || shared.work())?,
            );
        }
        Ok(pool)
    }

    /// Threads that share a loop, the caller among them.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body(i)` once for each `i < tasks` and returns when all calls are over. Which thread
    /// gets which `i` is undefined, so a result must not depend on it.
    ///
    /// While the pool is busy (a nested call, or one from another thread) the loop runs on the
    /// calling thread alone.
    ///
    /// # Panics
    /// With the first panic of `body`, after the calls in progress ended; the rest are skipped.
    pub fn run(&self, tasks: usize, body: impl Fn(usize) + Sync) {
        let busy = match self.caller.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if busy.is_none() || tasks < 2 || self.workers.is_empty() {
            drop(busy);
            (0..tasks).for_each(body);
            return;
        }
        self.run_shared(tasks, &body);
        drop(busy);
        if let Some(payload) = lock(&self.shared.panic).take() {
            resume_unwind(payload);
        }
    }

    fn run_shared(&self, tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. No worker uses the pointer after this function: the
        // state is closed before it returns, and it waits until no worker is active.
        let erased: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(body) };
        let job = Job {
            body: erased,
            tasks,
            caller: thread::current(),
        };
        // SAFETY: no worker is active and the state is not open (the previous loop left it so), and
        // `self.caller` is locked: nobody else touches the job.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        let epoch = (shared.state.load(Ordering::Relaxed) >> EPOCH_SHIFT).wrapping_add(1);
        shared
            .state
            .store((epoch << EPOCH_SHIFT) | OPEN, Ordering::Release);
        for worker in self.workers.iter().take(tasks - 1) {
            worker.thread().unpark();
        }
        shared.take_tasks(body, tasks);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        shared.wait(|state| state & ACTIVE == 0);
    }

    /// Calls `body(i, chunk)` for each `i`-th chunk of `len` elements of `data` (the last may be
    /// shorter), in parallel.
    ///
    /// # Panics
    /// If `len` is 0, and like [`run`](Self::run).
    pub fn run_chunks<T: Send>(
        &self,
        data: &mut [T],
        len: usize,
        body: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let total = data.len();
        let data = Disjoint::new(data);
        self.run(total.div_ceil(len), |i| {
            let start = i * len;
            // SAFETY: each `i` comes once, and chunks do not overlap.
            let chunk = unsafe { data.slice(start..total.min(start + len)) };
            body(i, chunk);
        });
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.state.fetch_or(SHUTDOWN, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker does not panic: it catches the panics of the loops it runs.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        loop {
            let state = self.wait(|state| {
                state & SHUTDOWN != 0 || (state & OPEN != 0 && state >> EPOCH_SHIFT != seen)
            });
            if state & SHUTDOWN != 0 {
                return;
            }
            let join = (state, state + 1);
            if self
                .state
                .compare_exchange(join.0, join.1, Ordering::AcqRel, Ordering::Relaxed)
                .is_err()
            {
                continue;
            }
            seen = state >> EPOCH_SHIFT;
            // SAFETY: this worker is active, so the caller does not write the job.
            let job = unsafe { &*self.job.get() }
                .clone()
                .expect("an open state has a job");
            // SAFETY: the caller keeps the body alive until no worker is active.
            self.take_tasks(unsafe { &*job.body }, job.tasks);
            let before = self.state.fetch_sub(1, Ordering::AcqRel);
            if before & OPEN == 0 && before & ACTIVE == 1 {
                job.caller.unpark();
            }
        }
    }

    /// Runs iterations until none is left.
    fn take_tasks(&self, body: &(dyn Fn(usize) + Sync), tasks: usize) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks {
                    break;
                }
                body(i);
            }
        }));
        if let Err(payload) = result {
            self.next.store(tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// Waits for a state: spins, then parks. Whoever brings such a state about unparks the waiter.
    fn wait(&self, wanted: impl Fn(u64) -> bool) -> u64 {
        let mut spinning_since = None;
        loop {
            for _ in 0..64 {
                let state = self.state.load(Ordering::Acquire);
                if wanted(state) {
                    return state;
                }
                std::hint::spin_loop();
            }
            if spinning_since.get_or_insert_with(Instant::now).elapsed() > SPIN {
                thread::park();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice that several threads write, each its own part.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it gives out exclusive parts only (the contract of `slice`), like split borrows of the slice.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Self {
            start: data.as_mut_ptr(),
            len: data.len(),
            owner: PhantomData,
        }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No two slices that are alive at the same time may overlap.
    #[inline]
    #[allow(clippy::mut_from_ref)] // what this type is for
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
        // SAFETY: in bounds of a slice that is borrowed mutably for 'a; the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = ThreadPool::new(4).unwrap();
        for tasks in [0, 1, 2, 3, 4, 5, 63, 1000] {
            let calls: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, |i| {
                calls[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                calls.iter().all(|calls| calls.load(Ordering::Relaxed) == 1),
                "{tasks} tasks"
            );
        }
    }

    #[test]
    fn loops_that_follow_each_other_see_what_the_last_one_wrote() {
        let pool = ThreadPool::new(3).unwrap();
        let mut data = vec![0u64; 100];
        for round in 0..20_000u64 {
            if round % 5_000 == 0 {
                thread::sleep(Duration::from_millis(2)); // let the workers park
            }
            pool.run_chunks(&mut data, 7, |i, chunk| {
                for (j, value) in chunk.iter_mut().enumerate() {
                    assert_eq!(*value, round * (i * 7 + j) as u64);
                    *value += (i * 7 + j) as u64;
                }
            });
        }
    }

    #[test]
    fn workers_take_part() {
        let pool = ThreadPool::new(3).unwrap();
        assert_eq!(pool.threads(), 3);
        let threads = Mutex::new(HashSet::new());
        pool.run(3, |_| {
            lock(&threads).insert(thread::current().id());
            // A task ends only when all three threads have one, so none can take two.
            while lock(&threads).len() < 3 {
                thread::yield_now();
            }
        });
    }

    #[test]
    fn nested_and_concurrent_loops_run_on_their_caller() {
        let pool = ThreadPool::new(2).unwrap();
        let count = AtomicUsize::new(0);
        pool.run(8, |_| {
            let outer = thread::current().id();
            pool.run(8, |_| {
                assert_eq!(thread::current().id(), outer);
                count.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(count.load(Ordering::Relaxed), 64);

        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let mut data = [0usize; 50];
                        pool.run_chunks(&mut data, 3, |i, chunk| chunk.fill(i));
                        assert!(data.iter().enumerate().all(|(j, &i)| i == j / 3));
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = ThreadPool::new(2).unwrap();
        for bad in [0, 17, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, |i| assert_ne!(i, bad, "task {bad} fails"));
            }));
            let payload = result.unwrap_err();
            let message = payload.downcast_ref::<String>().unwrap();
            assert!(message.contains(&format!("task {bad} fails")), "{message}");
            let count = AtomicUsize::new(0);
            pool.run(100, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 100);
        }
    }
}
