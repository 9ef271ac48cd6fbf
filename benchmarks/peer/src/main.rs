//! The opponent: a small disk on rust-vmm's vhost-user-backend, as one would write it who wants speed and has an afternoon.
//!
//!     peer SOCKET [FILE]
//!
//! Without a file it moves no data: it reads the header of a request, and writes the status.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

const QUEUE_SIZE: usize = 1024;
const SECTOR: u64 = 512;
const HEADER: u32 = 16;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// What a disk that keeps nothing says its size is.
const NOTHING: u64 = 1 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(socket), file) = (arguments.next(), arguments.next()) else {
        return Err("usage: peer SOCKET [FILE]".into());
    };
    let mut listener = Listener::new(socket, true)?;
    loop {
        let file = file.as_ref().map(|path| OpenOptions::new().read(true).write(true).open(path)).transpose()?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let disk = std::sync::Arc::new(std::sync::RwLock::new(Disk::new(memory.clone(), file)?));
        let mut daemon = VhostUserDaemon::new("peer".to_owned(), disk, memory).map_err(|error| error.to_string())?;
        daemon.start(&mut listener).map_err(|error| error.to_string())?;
        // The front-end is gone, and another one may come.
        let _ = daemon.wait();
    }
}

struct Disk {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    file: Option<File>,
    bytes: u64,
    event_idx: bool,
    /// Room for the descriptors of one request, and for the pieces of memory that its data is in.
    descriptors: Vec<Descriptor>,
    pieces: Vec<libc::iovec>,
}

// SAFETY: the pieces are pointers only while a request is being worked on, which is under a lock.
unsafe impl Send for Disk {}
// SAFETY: as above.
unsafe impl Sync for Disk {}

impl Disk {
    fn new(memory: GuestMemoryAtomic<GuestMemoryMmap>, file: Option<File>) -> io::Result<Self> {
        let bytes = file.as_ref().map_or(Ok(NOTHING), |file| file.metadata().map(|data| data.len()))?;
        Ok(Self { memory, file, bytes, event_idx: false, descriptors: Vec::new(), pieces: Vec::new() })
    }

    /// Work on everything that is available. Returns whether there was anything.
    fn process(&mut self, vring: &VringRwLock) -> io::Result<bool> {
        let memory = self.memory.memory();
        let mut vring = vring.get_mut();
        let mut any = false;
        while let Some(chain) = vring.get_queue_mut().pop_descriptor_chain(&*memory) {
            let head = chain.head_index();
            self.descriptors.clear();
            self.descriptors.extend(chain);
            let written = self.execute(&memory).ok_or_else(|| io::Error::other("a request that cannot be answered"))?;
            vring.add_used(head, written).map_err(io::Error::other)?;
            any = true;
        }
        if any && vring.needs_notification().map_err(io::Error::other)? {
            vring.signal_used_queue()?;
        }
        Ok(any)
    }

    /// Do what the request asks for that `descriptors` are, and write its status. Returns how many bytes were written.
    fn execute(&mut self, memory: &GuestMemoryMmap) -> Option<u32> {
        let (header, rest) = self.descriptors.split_first()?;
        let (status, data) = rest.split_last()?;
        if header.len() < HEADER || !status.is_write_only() {
            return None;
        }
        let header: [u8; HEADER as usize] = memory.read_obj(header.addr()).ok()?;
        let kind = u32::from_le_bytes(header[..4].try_into().ok()?);
        let sector = u64::from_le_bytes(header[8..].try_into().ok()?);
        let reads = kind == VIRTIO_BLK_T_IN;
        let mut count = 0;
        self.pieces.clear();
        for descriptor in data {
            let slice = memory.get_slice(descriptor.addr(), descriptor.len() as usize).ok()?;
            let pointer = slice.ptr_guard_mut().as_ptr();
            self.pieces.push(libc::iovec { iov_base: pointer.cast(), iov_len: slice.len() });
            count += u64::from(descriptor.len());
        }
        let end = sector.checked_mul(SECTOR).and_then(|start| start.checked_add(count));
        let answer = if kind != VIRTIO_BLK_T_IN && kind != VIRTIO_BLK_T_OUT {
            UNSUPPORTED
        } else if end.is_none_or(|end| end > self.bytes) {
            IO_ERROR
        } else {
            self.transfer(reads, sector * SECTOR, count)
        };
        let place: GuestAddress = status.addr();
        memory.write_obj(answer, place).ok()?;
        Some(if reads { count as u32 + 1 } else { 1 })
    }

    fn transfer(&self, reads: bool, offset: u64, count: u64) -> u8 {
        let Some(file) = &self.file else { return OK };
        let (pieces, number) = (self.pieces.as_ptr(), self.pieces.len() as i32);
        // SAFETY: the pieces are guest memory that was looked up for this request, and the caller has its mapping.
        let done = unsafe {
            if reads {
                libc::preadv(file.as_raw_fd(), pieces, number, offset as i64)
            } else {
                libc::pwritev(file.as_raw_fd(), pieces, number, offset as i64)
            }
        };
        if u64::try_from(done) == Ok(count) { OK } else { IO_ERROR }
    }
}

impl VhostUserBackendMut for Disk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut space = (self.bytes / SECTOR).to_le_bytes().to_vec();
        space.resize(offset as usize + size as usize, 0);
        space.split_off(offset as usize)
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        device_event: u16,
        events: EventSet,
        vrings: &[VringRwLock],
        _: usize,
    ) -> io::Result<()> {
        if events != EventSet::IN {
            return Err(ErrorKind::InvalidInput.into());
        }
        let vring = &vrings[usize::from(device_event)];
        if !self.event_idx {
            return self.process(vring).map(drop);
        }
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.process(vring)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}
