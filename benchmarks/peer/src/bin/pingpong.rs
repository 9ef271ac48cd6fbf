//! Two processes that wake each other through two eventfds: the least that a kick and a call can cost.
//!
//!     pingpong CORE OTHER_CORE SECONDS
//!
//! Prints how long it took there and back, the median, in nanoseconds.

use std::time::{Duration, Instant};

fn main() {
    let arguments: Vec<f64> = std::env::args().skip(1).map(|text| text.parse().expect("a number")).collect();
    let [core, other, seconds] = arguments[..] else { panic!("usage: pingpong CORE OTHER_CORE SECONDS") };
    // SAFETY: system calls on descriptors that are this program's own; the child of the fork uses nothing else.
    unsafe {
        let (there, back) = (libc::eventfd(0, 0), libc::eventfd(0, 0));
        assert!(there >= 0 && back >= 0);
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            pin(other as usize);
            loop {
                take(there);
                give(back);
            }
        }
        pin(core as usize);
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        let mut times = Vec::new();
        let mut before = Instant::now();
        while before < end {
            give(there);
            take(back);
            let now = Instant::now();
            times.push((now - before).as_nanos());
            before = now;
        }
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
        times.sort_unstable();
        println!("{}", times[times.len() / 2]);
    }
}

unsafe fn pin(core: usize) {
    // SAFETY: a set of processors is plain bits, and the one that is set is checked by the macro and by the kernel.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        assert_eq!(libc::sched_setaffinity(0, size_of_val(&set), &set), 0);
    }
}

unsafe fn give(event: i32) {
    let one = 1u64;
    // SAFETY: eight bytes that are there.
    assert_eq!(unsafe { libc::write(event, (&raw const one).cast(), 8) }, 8);
}

unsafe fn take(event: i32) {
    let mut count = 0u64;
    // SAFETY: room for eight bytes.
    assert_eq!(unsafe { libc::read(event, (&raw mut count).cast(), 8) }, 8);
}
