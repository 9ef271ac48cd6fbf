//! The bytes of a device's configuration space.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Shared by the device, which writes to it from any thread, and the session, which answers GET_CONFIG from it.
#[derive(Debug, Default)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
}

impl ConfigSpace {
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes) }
    }

    /// Bytes in the space. Zero means that the device has none.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `length` bytes from `offset` on. Drivers and front ends know longer layouts than ours: the rest is zeroes.
    #[must_use]
    pub fn read(&self, offset: usize, length: usize) -> Vec<u8> {
        let mut answer = vec![0; length];
        let bytes = self.lock();
        if let Some(known) = bytes.get(offset..) {
            let count = known.len().min(length);
            answer[..count].copy_from_slice(&known[..count]);
        }
        answer
    }

    /// Replace bytes. What is outside the space is an error that changes nothing.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), String> {
        let mut bytes = self.lock();
        let length = bytes.len();
        let Some(target) = offset.checked_add(data.len()).and_then(|end| bytes.get_mut(offset..end)) else {
            return Err(format!(
                "bytes {offset}..{} are outside the {length} of the configuration space",
                offset.saturating_add(data.len())
            ));
        };
        target.copy_from_slice(data);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
