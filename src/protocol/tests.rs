//! The message tables against themselves, against recorded bytes, and against what a C compiler makes of the structures.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;

/// The properties that both tables have to have, whatever is in their rows.
macro_rules! table_properties {
    ($module:ident, $request:ident, $message:ident) => {
        mod $module {
            use super::*;

            proptest! {
                #[test]
                fn every_message_survives_the_wire(seed in any::<[u8; 8]>(), filler in prop::collection::vec(any::<u8>(), 4096)) {
                    for info in $request::TABLE {
                        let request = $request::from_id(info.id).unwrap();
                        let bytes = wire_bytes(info.payload, seed, &filler);
                        let accepted: Vec<usize> =
                            (0..=9).filter(|count| $message::decode(request, &bytes, *count).is_ok()).collect();
                        prop_assert_eq!(&accepted, &descriptors_of(info, &bytes), "{}", info.name);

                        let message = $message::decode(request, &bytes, accepted[0]).unwrap();
                        prop_assert_eq!(message.request(), request);
                        prop_assert_eq!(message.queue().is_some(), info.rings == Rings::One, "{}", info.name);
                        let mut encoded = Vec::new();
                        message.encode(&mut encoded);
                        let expected = if info.payload == "Ignored" { &[][..] } else { &bytes[..] };
                        prop_assert_eq!(&encoded[..], expected, "{}", info.name);
                        prop_assert_eq!($message::decode(request, &encoded, accepted[0]).unwrap(), message);
                    }
                }

                #[test]
                fn no_bytes_make_the_decoder_panic(
                    id in 0..70u32,
                    bytes in prop::collection::vec(any::<u8>(), 0..2200),
                    descriptors in 0..12usize,
                ) {
                    let Ok(request) = $request::from_id(id) else { return Ok(()) };
                    if let Ok(message) = $message::decode(request, &bytes, descriptors) {
                        let mut encoded = Vec::new();
                        message.encode(&mut encoded);
                        prop_assert_eq!($message::decode(request, &encoded, descriptors).unwrap(), message);
                    }
                }
            }

            #[test]
            fn a_payload_of_another_length_is_refused() {
                for info in $request::TABLE.iter().filter(|info| info.payload != "Ignored") {
                    let request = $request::from_id(info.id).unwrap();
                    let bytes = wire_bytes(info.payload, [0; 8], &[0; 4096]);
                    let count = descriptors_of(info, &bytes)[0];
                    let longer = [&bytes[..], &[0]].concat();
                    // SET_MEM_TABLE may be longer: User-Mode Linux always sends two regions.
                    let wrong = bytes.split_last().map(|(_, shorter)| shorter).into_iter();
                    for bytes in wrong.chain((info.payload != "MemoryTable").then_some(&longer[..])) {
                        let error = $message::decode(request, bytes, count).unwrap_err().to_string();
                        assert!(error.starts_with(&format!("{}: ", info.name)), "{error}");
                    }
                }
            }

            #[test]
            fn the_rows_are_in_order_and_found_by_their_ids() {
                assert!($request::TABLE.is_sorted_by_key(|info| info.id));
                for info in $request::TABLE {
                    let request = $request::from_id(info.id).unwrap();
                    assert_eq!((request as u32, request.info(), request.name()), (info.id, info, info.name));
                }
                for id in [0, $request::TABLE.last().unwrap().id + 1, u32::MAX] {
                    let error = $request::from_id(id).unwrap_err().to_string();
                    assert!(error.starts_with(&format!("unknown request {id} ")), "{error}");
                }
            }
        }
    };
}

table_properties!(frontend, FrontendRequest, FrontendMessage);
table_properties!(backend, BackendRequest, BackendMessage);

/// Bytes that are a payload of this kind; `seed` chooses its variant and its first field.
fn wire_bytes(payload: &str, seed: [u8; 8], filler: &[u8]) -> Vec<u8> {
    let number = usize::from(seed[0]);
    match payload {
        "MemoryTable" => {
            let regions = number % (MemoryTable::MAX_REGIONS + 1);
            [&(regions as u32).to_ne_bytes()[..], &[0; 4], &filler[..32 * regions]].concat()
        }
        "Config" => {
            let size = number * 16;
            [&seed[..4], &(size as u32).to_ne_bytes(), &seed[4..], &filler[..size]].concat()
        }
        "LogBase" => filler[..[8, 16][number % 2]].to_vec(),
        "Ignored" => filler[..number].to_vec(),
        // The flag that tells whether a descriptor comes along is among the low bits.
        "VringDescriptor" => u64::from(u16::from_ne_bytes([seed[0], seed[1]]) & 0x1ff).to_ne_bytes().to_vec(),
        "VringArea" => [&wire_bytes("VringDescriptor", seed, filler)[..], &filler[..16]].concat(),
        fixed => {
            let size = match fixed {
                "Empty" => 0,
                "U64" | "VringState" | "DeviceState" => 8,
                "Uuid" => 16,
                "Inflight" => 24,
                "Iotlb" => 32,
                "VringAddress" | "SingleRegion" | "ShmemMap" => 40,
                "CryptoSession" => 1072,
                other => panic!("this test does not know the payload {other}"),
            };
            filler[..size].to_vec()
        }
    }
}

/// How many descriptors may come with the payload: the reference's words, not the decoder's.
fn descriptors_of(info: &Info, bytes: &[u8]) -> Vec<usize> {
    match (info.descriptors, info.payload) {
        (Descriptors::None, _) => vec![0],
        (Descriptors::One, _) => vec![1],
        (Descriptors::AtMostOne, _) => vec![0, 1],
        (Descriptors::Described, "MemoryTable") => vec![(bytes.len() - 8) / 32],
        (Descriptors::Described, "LogBase") => vec![usize::from(bytes.len() == 16)],
        (Descriptors::Described, _) => {
            vec![usize::from(u64::from_ne_bytes(bytes[..8].try_into().unwrap()) & 0x100 == 0)]
        }
    }
}

/// The ids of the rows that are so.
fn ids(table: &[Info], is_so: impl Fn(&Info) -> bool) -> Vec<u32> {
    table.iter().filter(|info| is_so(info)).map(|info| info.id).collect()
}

#[test]
fn the_tables_say_what_the_specification_says() {
    let (frontend, backend) = (FrontendRequest::TABLE, BackendRequest::TABLE);
    assert_eq!(ids(frontend, |_| true), (1..=45).collect::<Vec<_>>());
    assert_eq!(ids(backend, |_| true), (1..=10).collect::<Vec<_>>());

    assert_eq!(ids(frontend, |info| info.descriptors == Descriptors::One), [7, 21, 32, 33, 37, 42]);
    assert_eq!(ids(frontend, |info| info.descriptors == Descriptors::Described), [5, 6, 12, 13, 14]);
    assert_eq!(ids(frontend, |info| info.descriptors == Descriptors::AtMostOne), [38]);
    assert_eq!(ids(backend, |info| info.descriptors == Descriptors::One), [9]);
    assert_eq!(ids(backend, |info| info.descriptors == Descriptors::Described), [3]);

    let answers = [1, 6, 11, 15, 17, 22, 24, 26, 28, 30, 31, 36, 40, 41, 42, 43, 44, 45];
    assert_eq!(ids(frontend, |info| info.answer != Answer::Ack), answers);
    assert_eq!(ids(backend, |info| info.answer != Answer::Ack), [8]);

    for bit in 0..u64::BITS {
        let needs_it = ids(frontend, |info| info.gate == Gate::Protocol(ProtocolFeatures(1 << bit)));
        let expected: &[u32] = match bit {
            0 => &[17],
            2 => &[19],
            4 => &[20],
            5 => &[21],
            6 => &[23],
            7 => &[26, 27],
            8 => &[28, 29, 30],
            9 => &[24, 25],
            12 => &[31, 32],
            13 => &[34],
            14 => &[35],
            15 => &[36, 37, 38],
            16 => &[39, 40],
            18 => &[41],
            19 => &[42, 43],
            22 => &[44],
            23 => &[45],
            _ => &[],
        };
        assert_eq!(needs_it, expected, "bit {bit}");
    }
}

#[test]
fn user_mode_linux_sends_a_table_of_one_region_with_room_for_two() {
    let region = Region { guest_address: 0x21f2_1000, size: 0x5ae_2000, user_address: 0x21f2_1000, file_offset: 7 };
    let table = MemoryTable { regions: vec![region, Region::default()] };
    let mut bytes = Vec::new();
    table.encode(&mut bytes);
    bytes[0] = 1;
    assert_eq!(bytes.len(), 72);
    let message = FrontendMessage::decode(FrontendRequest::SetMemTable, &bytes, 1).unwrap();
    assert_eq!(message, FrontendMessage::SetMemTable(MemoryTable { regions: vec![region] }));
    bytes[0] = 9;
    let error = FrontendMessage::decode(FrontendRequest::SetMemTable, &bytes, 9).unwrap_err();
    assert_eq!(error.to_string(), "SET_MEM_TABLE: 9 regions; at most 8 are allowed");
}

#[test]
fn bits_above_the_index_are_no_queue() {
    let body = |bits: u64| FrontendMessage::SetVringKick(VringDescriptor(bits));
    assert_eq!((body(0x1ff).queue(), body(0x0ff).queue()), (Some(255), Some(255)));
    assert!(body(0x200).queue().unwrap() > 255);
    assert!(body(1 << 40).queue().unwrap() > 255);
}

proptest! {
    #[test]
    fn a_header_survives_the_wire_and_is_checked(request: u32, flags: u32, size: u32, expected in 0..50u32) {
        let header = Header { request, flags: Flags(flags), size };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        prop_assert_eq!(Header::decode(&bytes.try_into().unwrap()), header);
        prop_assert_eq!(header.check_size().is_ok(), size as usize <= MAX_PAYLOAD);
        prop_assert_eq!(header.check_request().is_ok(), matches!(flags, 0x1 | 0x9));
        let header = Header { request: expected, ..header };
        prop_assert_eq!(header.check_reply(expected, "X").is_ok(), matches!(flags, 0x5 | 0xd));
        prop_assert!(header.check_reply(expected + 1, "X").is_err());
    }
}

#[test]
fn the_four_legal_flag_words_are_told_apart() {
    let header = |flags| Header { request: 1, flags: Flags(flags), size: 0 };
    for flags in 0..64 {
        assert_eq!(header(flags).check_request().is_ok(), matches!(flags, 0x1 | 0x9), "{flags:#x}");
        assert_eq!(header(flags).check_reply(1, "X").is_ok(), matches!(flags, 0x5 | 0xd), "{flags:#x}");
        assert!(header(flags).check_reply(2, "X").is_err());
    }
}

// Bytes as they were seen on the wire.

/// Bytes from groups of hexadecimal digits.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn framed(request: u32, flags: u32, payload: &impl Payload) -> Vec<u8> {
    let (mut body, mut bytes) = (Vec::new(), Vec::new());
    payload.encode(&mut body);
    Header { request, flags: Flags(flags), size: body.len() as u32 }.encode(&mut bytes);
    [bytes, body].concat()
}

#[test]
#[cfg(target_endian = "little")]
fn messages_are_the_bytes_that_were_recorded() {
    use FrontendMessage as M;
    let region = Region { guest_address: 0, size: 256 << 20, user_address: 0x7f00_0000_0000, file_offset: 0 };
    let state = |index, num| VringState { index, num };
    let address = VringAddress {
        index: 1,
        flags: 0,
        descriptors: 0x7f00_0000_1000,
        used: 0x7f00_0000_3000,
        avail: 0x7f00_0000_2000,
        log: 0,
    };
    let config = Config { offset: 0, flags: 0, bytes: vec![0; 8] };
    let requests = [
        ("01000000 01000000 00000000", 0, M::GetFeatures(Empty)),
        ("10000000 09000000 08000000 28020000 00000000", 0, M::SetProtocolFeatures(U64(1 << 3 | 1 << 5 | 1 << 9))),
        ("15000000 09000000 00000000", 1, M::SetBackendReqFd(Empty)),
        (
            "05000000 09000000 28000000 01000000 00000000 00000000 00000000 00000010 00000000 00000000 007f0000 00000000
             00000000",
            1,
            M::SetMemTable(MemoryTable { regions: vec![region] }),
        ),
        (
            "25000000 09000000 28000000 00000000 00000000 00000000 00000000 00000010 00000000 00000000 007f0000 00000000
             00000000",
            1,
            M::AddMemReg(SingleRegion { padding: 0, region }),
        ),
        ("08000000 01000000 08000000 01000000 00010000", 0, M::SetVringNum(state(1, 256))),
        (
            "09000000 01000000 28000000 01000000 00000000 00100000 007f0000 00300000 007f0000 00200000 007f0000 00000000
             00000000",
            0,
            M::SetVringAddr(address),
        ),
        ("0c000000 01000000 08000000 01000000 00000000", 1, M::SetVringKick(VringDescriptor::new(1, true))),
        ("0c000000 01000000 08000000 01010000 00000000", 0, M::SetVringKick(VringDescriptor::new(1, false))),
        ("12000000 09000000 08000000 01000000 01000000", 0, M::SetVringEnable(state(1, 1))),
        ("0b000000 01000000 08000000 01000000 00000000", 0, M::GetVringBase(state(1, 0))),
        ("18000000 01000000 14000000 00000000 08000000 00000000 00000000 00000000", 0, M::GetConfig(config)),
        (
            "2a000000 01000000 08000000 00000000 00000000",
            1,
            M::SetDeviceStateFd(DeviceState { direction: 0, phase: 0 }),
        ),
    ];
    for (recorded, descriptors, message) in requests {
        let bytes = hex(recorded);
        let header = Header::decode(bytes[..HEADER_SIZE].try_into().unwrap());
        header.check_request().unwrap();
        assert_eq!(header.size as usize, bytes.len() - HEADER_SIZE);
        let request = FrontendRequest::from_id(header.request).unwrap();
        let decoded = FrontendMessage::decode(request, &bytes[HEADER_SIZE..], descriptors).unwrap();
        assert_eq!(decoded, message);
        let mut body = Vec::new();
        message.encode(&mut body);
        assert_eq!(body, bytes[HEADER_SIZE..], "{}", request.name());
    }

    let bits = VirtioFeatures::PROTOCOL_FEATURES | VirtioFeatures::VERSION_1;
    let split = state(1, 7);
    let packed = state(1, 5 | 1 << 15 | 4 << 16 | 1 << 31);
    for (recorded, bytes) in [
        ("01000000 05000000 08000000 00000040 01000000", framed(1, Flags::ANSWER.0, &U64(bits.0))),
        ("10000000 05000000 08000000 00000000 00000000", framed(16, Flags::ANSWER.0, &U64(0))),
        ("0b000000 05000000 08000000 01000000 07000000", framed(11, Flags::ANSWER.0, &split)),
        ("0b000000 05000000 08000000 01000000 05800480", framed(11, Flags::ANSWER.0, &packed)),
        ("18000000 05000000 00000000", framed(24, Flags::ANSWER.0, &Empty)),
        ("2a000000 05000000 08000000 00010000 00000000", framed(42, Flags::ANSWER.0, &U64(0x100))),
        ("04000000 09000000 08000000 01000000 00000000", framed(4, Flags::REQUEST_NEED_REPLY.0, &state(1, 0))),
        ("04000000 05000000 08000000 00000000 00000000", framed(4, Flags::ANSWER.0, &U64(0))),
    ] {
        assert_eq!(bytes, hex(recorded));
    }
}

// What the C compiler says.

/// What a C program prints, as numbers. A machine without a C compiler cannot say whether the layouts are right.
pub(crate) fn run_c(source: &str) -> Vec<usize> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let program = std::env::temp_dir().join(format!("vhost-user-layout-{}-{number}", std::process::id()));
    let compiler = Command::new("cc").args(["-x", "c", "-", "-o"]).arg(&program).stdin(Stdio::piped()).spawn();
    let mut compiler = compiler.expect("this test needs a C compiler called cc");
    compiler.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
    assert!(compiler.wait().unwrap().success(), "the program does not compile:\n{source}");
    let output = Command::new(&program).output();
    std::fs::remove_file(&program).unwrap();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    text.split_whitespace().map(|number| number.parse().unwrap()).collect()
}

/// The kernel's structures where it has them, and the specification's where it has not.
const STRUCTURES: &str = "
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <linux/vhost_types.h>

struct header { uint32_t request, flags, size; } __attribute__((packed));
struct u64 { uint64_t value; };
struct table_of_one { uint32_t nregions, padding; struct vhost_memory_region regions[1]; };
_Static_assert(offsetof(struct table_of_one, regions) == offsetof(struct vhost_memory, regions), \"vhost_memory\");
struct single_region { uint64_t padding; struct vhost_memory_region region; };
struct log { uint64_t size, offset; };
struct iotlb { struct vhost_iotlb_msg message; };
struct config { uint32_t offset, size, flags; uint8_t region[4]; };
struct vring_area { uint64_t u64, size, offset; };
struct inflight { uint64_t mmap_size, mmap_offset; uint16_t num_queues, queue_size; };
struct device_state { uint32_t direction, phase; };
struct shmem_map { uint8_t shmid; uint8_t padding[7]; uint64_t fd_offset, shm_offset, len, flags; };
struct shmem_config { uint32_t nregions, padding; uint64_t memory_sizes[256]; };
struct crypto_session {
    uint64_t op_code;
    union { struct { uint8_t info[48], key[64], auth_key[512]; } sym; struct { uint8_t info[32], key[1024]; } asym; } u;
    int64_t session_id;
};
";

/// A C structure, our bytes for it, and what each of its fields has to be in them.
struct Layout {
    structure: &'static str,
    bytes: Vec<u8>,
    fields: Vec<(&'static str, u64)>,
}

fn layout(structure: &'static str, payload: &impl Payload, fields: &[(&'static str, u64)]) -> Layout {
    let mut bytes = Vec::new();
    payload.encode(&mut bytes);
    Layout { structure, bytes, fields: fields.to_vec() }
}

#[test]
fn structures_are_laid_out_as_c_lays_them_out() {
    let region = Region { guest_address: 11, size: 12, user_address: 13, file_offset: 14 };
    let mut header = Vec::new();
    Header { request: 1, flags: Flags(2), size: 3 }.encode(&mut header);
    let mut sizes = [0; 256];
    sizes[255] = 9;
    let mut parameters = [0; 1056];
    (parameters[0], parameters[1055]) = (4, 5);
    let layouts = [
        Layout { structure: "struct header", bytes: header, fields: vec![("request", 1), ("flags", 2), ("size", 3)] },
        layout("struct u64", &U64(1 << 63), &[("value", 1 << 63)]),
        layout("struct vhost_vring_state", &VringState { index: 1, num: 2 }, &[("index", 1), ("num", 2)]),
        layout(
            "struct vhost_vring_addr",
            &VringAddress { index: 1, flags: 2, descriptors: 3, used: 4, avail: 5, log: 6 },
            &[
                ("index", 1),
                ("flags", 2),
                ("desc_user_addr", 3),
                ("used_user_addr", 4),
                ("avail_user_addr", 5),
                ("log_guest_addr", 6),
            ],
        ),
        layout(
            "struct vhost_memory_region",
            &region,
            &[("guest_phys_addr", 11), ("memory_size", 12), ("userspace_addr", 13), ("flags_padding", 14)],
        ),
        layout(
            "struct table_of_one",
            &MemoryTable { regions: vec![region] },
            &[("nregions", 1), ("padding", 0), ("regions[0].guest_phys_addr", 11), ("regions[0].flags_padding", 14)],
        ),
        layout(
            "struct single_region",
            &SingleRegion { padding: 1, region },
            &[("padding", 1), ("region.guest_phys_addr", 11), ("region.memory_size", 12)],
        ),
        layout("struct log", &Log { size: 1, offset: 2 }, &[("size", 1), ("offset", 2)]),
        layout(
            "struct iotlb",
            &Iotlb { iova: 1, size: 2, user_address: 3, permission: 4, kind: 5, padding: [0; 6] },
            &[("message.iova", 1), ("message.size", 2), ("message.uaddr", 3), ("message.perm", 4), ("message.type", 5)],
        ),
        layout(
            "struct config",
            &Config { offset: 1, flags: 2, bytes: vec![3, 0, 0, 0] },
            &[("offset", 1), ("size", 4), ("flags", 2), ("region[0]", 3)],
        ),
        layout(
            "struct vring_area",
            &VringArea { queue: VringDescriptor::new(7, false), size: 2, offset: 3 },
            &[("u64", 0x107), ("size", 2), ("offset", 3)],
        ),
        layout(
            "struct inflight",
            &Inflight { size: 1, offset: 2, queues: 3, queue_size: 4, padding: 0 },
            &[("mmap_size", 1), ("mmap_offset", 2), ("num_queues", 3), ("queue_size", 4)],
        ),
        layout("struct device_state", &DeviceState { direction: 1, phase: 2 }, &[("direction", 1), ("phase", 2)]),
        layout(
            "struct shmem_map",
            &ShmemMap { region: 1, padding: [0; 7], file_offset: 2, region_offset: 3, size: 4, flags: 5 },
            &[("shmid", 1), ("fd_offset", 2), ("shm_offset", 3), ("len", 4), ("flags", 5)],
        ),
        layout(
            "struct shmem_config",
            &ShmemConfig { regions: 1, padding: 0, sizes },
            &[("nregions", 1), ("memory_sizes[0]", 0), ("memory_sizes[255]", 9)],
        ),
        layout(
            "struct crypto_session",
            &CryptoSession { operation: 1, parameters, session: -2 },
            &[("op_code", 1), ("u.sym.info[0]", 4), ("u.asym.key[1023]", 5), ("session_id", -2i64 as u64)],
        ),
    ];

    let mut program = format!("{STRUCTURES}int main(void) {{\n");
    for Layout { structure, fields, .. } in &layouts {
        program += &format!("printf(\"%zu \", sizeof({structure}));\n");
        for (field, _) in fields {
            let size = format!("sizeof((({structure} *)0)->{field})");
            program += &format!("printf(\"%zu %zu \", offsetof({structure}, {field}), {size});\n");
        }
    }
    program += "return 0; }\n";
    let mut numbers = run_c(&program).into_iter();
    let mut next = || numbers.next().expect("the program prints a number for each question");
    for Layout { structure, bytes, fields } in layouts {
        assert_eq!(bytes.len(), next(), "sizeof {structure}");
        for (field, expected) in fields {
            let (offset, size) = (next(), next());
            let piece = &bytes[offset..offset + size];
            let value = match size {
                1 => piece[0].into(),
                2 => u16::from_ne_bytes(piece.try_into().unwrap()).into(),
                4 => u32::from_ne_bytes(piece.try_into().unwrap()).into(),
                _ => u64::from_ne_bytes(piece.try_into().unwrap()),
            };
            assert_eq!(value, expected, "{structure}.{field}");
        }
    }
    assert_eq!(numbers.next(), None);
}
