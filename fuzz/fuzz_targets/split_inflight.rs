#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vhost_user_fuzz::inflight::split(input));
