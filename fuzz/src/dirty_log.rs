//! A dirty log of any place and size, and marks of any range: those of a model, and nothing before or behind.

use std::collections::BTreeSet;

use rustix::io::{pread, pwrite};
use vhost_user::memory::{DirtyLog, PAGE_SIZE};
use vhost_user::protocol::Log;

use super::support::{Input, feed, memory_file, number};

const FILE: u64 = 0x3000;

pub fn run(input: &[u8]) {
    feed(input, play);
}

fn play(input: &mut Input<'_>) -> arbitrary::Result<()> {
    let file = memory_file(FILE);
    let number_in = |input: &mut Input<'_>, most: u64| {
        if input.ratio(7u8, 8u8)? { input.int_in_range(0..=most) } else { number(input) }
    };
    let (size, offset) = (number_in(input, 0x1010)?, number_in(input, 0x1010)?);
    let fits = size > 0 && offset.checked_add(size).is_some_and(|end| end <= FILE);
    let log = match DirtyLog::map(Log { size, offset }, &file) {
        Ok(log) => log,
        Err(error) => {
            assert!(!fits, "{error}");
            return Ok(());
        }
    };
    assert!(fits);
    assert_eq!(log.pages(), size * 8);
    let mut marked = BTreeSet::new();
    while !input.is_empty() {
        let address = number_in(input, size * 8 * PAGE_SIZE)?;
        let length = number_in(input, 5 * PAGE_SIZE)?;
        if input.ratio(1u8, 8u8)? {
            // The front-end takes what there is.
            pwrite(&file, &vec![0; size as usize], offset).unwrap();
            marked.clear();
        }
        log.mark(address, length);
        if length > 0 {
            let last = address.saturating_add(length - 1) / PAGE_SIZE;
            marked.extend(address / PAGE_SIZE..=last.min(log.pages() - 1));
        }
    }
    let mut found = vec![0; FILE as usize];
    pread(&file, &mut found, 0).unwrap();
    let mut expected = vec![0; FILE as usize];
    for page in marked.into_iter().filter(|page| *page < log.pages()) {
        expected[(offset + page / 8) as usize] |= 1 << (page % 8);
    }
    assert!(found == expected);
    Ok(())
}
