//! A load by others: what `fio --ioengine=libblkio` does, with the crates that libblkio is made of.
//!
//!     blkio SOCKET random|sequential BLOCK DEPTH block|poll SECONDS
//!
//! Reads blocks of a disk. Each request is submitted by itself until there are so many; then the program sleeps until one
//! is completed, or looks for it all the time, and makes another for each that is. Prints requests a second, and how long
//! one took from its submission to where its completion was seen, in microseconds.

use std::error::Error;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, ReqFlags};

const USAGE: &str = "usage: blkio SOCKET random|sequential BLOCK DEPTH block|poll SECONDS";

/// Entries of the queue: what every disk has, and room for 42 requests of three descriptors.
const QUEUE_SIZE: i32 = 128;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, order, block, depth, wait, seconds] = &arguments[..] else { return Err(USAGE.into()) };
    let (block, depth): (usize, usize) = (block.parse()?, depth.parse()?);
    let runtime = Duration::from_secs_f64(seconds.parse()?);
    let random = match order.as_str() {
        "random" => true,
        "sequential" => false,
        _ => return Err(USAGE.into()),
    };
    let polls = match wait.as_str() {
        "block" => false,
        "poll" => true,
        _ => return Err(USAGE.into()),
    };
    let mut disk = Blkio::new("virtio-blk-vhost-user").map_err(text)?;
    disk.set_str("path", socket).map_err(text)?;
    disk.connect().map_err(text)?;
    disk.set_i32("queue-size", QUEUE_SIZE).map_err(text)?;
    disk.set_i32("num-queues", i32::from(!polls)).map_err(text)?;
    disk.set_i32("num-poll-queues", i32::from(polls)).map_err(text)?;
    let mut queues = disk.start().map_err(text)?;
    let queue = if polls { queues.poll_queues.pop() } else { queues.queues.pop() };
    let memory = disk.alloc_mem_region(block * depth).map_err(text)?;
    disk.map_mem_region(&memory).map_err(text)?;
    let mut load = Load {
        queue: queue.ok_or("the disk has no queue")?,
        buffers: memory.addr as *mut u8,
        block,
        blocks: disk.get_u64("capacity").map_err(text)? / block as u64,
        random,
        next: 0x2545_f491_4f6c_dd1d,
        submitted: vec![Instant::now(); depth],
        times: Vec::new(),
    };
    let elapsed = load.run(runtime)?;
    let (count, total) = (load.times.len(), load.times.iter().map(|time| u64::from(*time)).sum::<u64>());
    load.times.sort_unstable();
    let p50 = load.times.get(count / 2).copied().unwrap_or(0);
    println!(
        "{{\"iops\": {:.1}, \"mean\": {:.3}, \"p50\": {:.3}}}",
        count as f64 / elapsed.as_secs_f64(),
        total as f64 / count.max(1) as f64 / 1000.0,
        f64::from(p50) / 1000.0
    );
    Ok(())
}

/// Its messages are not for printing by themselves.
fn text(error: blkio::Error) -> String {
    error.message().to_owned()
}

struct Load {
    queue: Blkioq,
    /// One block for each request.
    buffers: *mut u8,
    block: usize,
    blocks: u64,
    random: bool,
    next: u64,
    /// When each request that is under way was submitted.
    submitted: Vec<Instant>,
    /// How long each took, in nanoseconds.
    times: Vec<u32>,
}

impl Load {
    fn run(&mut self, runtime: Duration) -> Result<Duration, Box<dyn Error>> {
        let depth = self.submitted.len();
        let mut completions: Vec<_> = (0..depth).map(|_| MaybeUninit::<Completion>::uninit()).collect();
        let begin = Instant::now();
        for slot in 0..depth {
            self.submit(slot)?;
        }
        let mut under_way = depth;
        while under_way > 0 {
            let done = self.queue.do_io(&mut completions, 1, None, None).map_err(text)?;
            let now = Instant::now();
            for completion in &completions[..done] {
                // SAFETY: `do_io` wrote so many of them.
                let completion = unsafe { completion.assume_init_ref() };
                if completion.ret != 0 {
                    return Err(std::io::Error::from_raw_os_error(-completion.ret).into());
                }
                let slot = completion.user_data;
                self.times.push((now - self.submitted[slot]).as_nanos() as u32);
                if now - begin < runtime {
                    self.submit(slot)?;
                } else {
                    under_way -= 1;
                }
            }
        }
        Ok(begin.elapsed())
    }

    fn submit(&mut self, slot: usize) -> Result<(), Box<dyn Error>> {
        let at = if self.random {
            self.next ^= self.next << 13;
            self.next ^= self.next >> 7;
            self.next ^= self.next << 17;
            self.next % self.blocks
        } else {
            self.next = (self.next + 1) % self.blocks;
            self.next
        };
        // SAFETY: the memory has a block for each slot.
        let buffer = unsafe { self.buffers.add(slot * self.block) };
        self.submitted[slot] = Instant::now();
        self.queue.read(at * self.block as u64, buffer, self.block, slot, ReqFlags::empty());
        self.queue.do_io(&mut [], 0, None, None).map_err(text)?;
        Ok(())
    }
}
