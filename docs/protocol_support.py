"""Writes protocol-support.md: run it when a message, a feature, or a test of one has changed.

The messages and features come from the tables of the core; what is here is by which test each is known to work. A test
makes sure that the page is up to date, that nothing is missing, and that every test that is named is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vhost_user._core import MessageInfo, ProtocolFeature, TransportFeature, messages

PAGE = Path(__file__).with_name("protocol-support.md")


@dataclass(frozen=True)
class Support:
    """By which tests something is known to work, as `file::name` below tests/; None where it is not supported."""

    device: str | None = None
    driver: str | None = None


#: What was said in a session with a peer, at least: messages, and features that have none. Where the session is that of
#: a test of this page, it is traced, and the test compares it.
_RINGS = (
    "GET_FEATURES SET_FEATURES SET_OWNER GET_PROTOCOL_FEATURES SET_PROTOCOL_FEATURES SET_VRING_NUM SET_VRING_ADDR "
    "SET_VRING_BASE SET_VRING_KICK SET_VRING_CALL SET_VRING_ENABLE VERSION_1 PROTOCOL_FEATURES "
)
_SET_UP = _RINGS + "GET_QUEUE_NUM SET_BACKEND_REQ_FD GET_CONFIG REPLY_ACK "
_SLOTS = "SET_VRING_ERR GET_VRING_BASE GET_MAX_MEM_SLOTS ADD_MEM_REG "
_CRATE = (
    "SET_MEM_TABLE REM_MEM_REG SET_CONFIG SET_LOG_BASE RESET_DEVICE GET_INFLIGHT_FD SET_INFLIGHT_FD "
    "SET_DEVICE_STATE_FD CHECK_DEVICE_STATE GET_SHMEM_CONFIG GET_SHARED_OBJECT BACKEND_SHARED_OBJECT_ADD "
    "BACKEND_SHARED_OBJECT_REMOVE BACKEND_SHMEM_MAP BACKEND_SHMEM_UNMAP "
)
_STATE = "SET_LOG_BASE LOG_SHMFD LOG_ALL SET_DEVICE_STATE_FD CHECK_DEVICE_STATE "
_DPDK = _RINGS + "SET_MEM_TABLE GET_VRING_BASE SET_STATUS GET_STATUS REPLY_ACK "
_VMM = _RINGS + "SET_MEM_TABLE GET_CONFIG "
SEEN = {
    "QEMU": {
        *(_SET_UP + _SLOTS + "GET_INFLIGHT_FD SET_INFLIGHT_FD RESET_DEVICE SET_STATUS GET_STATUS ").split(),
        *("GPA_ADDRESSES", "INDIRECT_DESC", "EVENT_IDX"),
    },
    "UML": {*(_SET_UP + "SET_MEM_TABLE INDIRECT_DESC EVENT_IDX").split()},
    "QEMU (killed disk)": {"GET_INFLIGHT_FD", "SET_INFLIGHT_FD"},
    "QEMU (ring formats)": {"RING_PACKED", "IN_ORDER"},
    "QEMU (migration)": {"SET_LOG_BASE", "LOG_SHMFD", "LOG_ALL"},
    "QEMU (device state)": {"SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE"},
    "QEMU (postcopy)": {"POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_END", "GET_VRING_BASE_INFLIGHT"},
    "QEMU (IOMMU)": {"IOTLB_MSG", "BACKEND_IOTLB_MSG", "ACCESS_PLATFORM"},
    "QEMU (input)": {"SET_CONFIG", "BACKEND_CONFIG_CHANGE_MSG"},
    "QEMU (network)": {"NET_SET_MTU", "SEND_RARP"},
    "QEMU (crypto)": {"CREATE_CRYPTO_SESSION", "CLOSE_CRYPTO_SESSION"},
    "QEMU (GPU)": {"GPU_SET_SOCKET"},
    "QEMU (windows)": {
        "GET_SHMEM_CONFIG",
        "REM_MEM_REG",
        "BACKEND_SHMEM_MAP",
        "BACKEND_SHMEM_UNMAP",
        "BACKEND_VRING_HOST_NOTIFIER_MSG",
        "BACKEND_SEND_FD",
        "BACKEND_SHARED_OBJECT_ADD",
        "BACKEND_SHARED_OBJECT_REMOVE",
        "BACKEND_SHARED_OBJECT_LOOKUP",
    },
    "UML (ring formats)": {"RING_PACKED", "IN_ORDER"},
    "UML (in-band)": {"VRING_KICK", "BACKEND_VRING_CALL"},
    "cloud-hypervisor": {
        *(_VMM + "GET_QUEUE_NUM GET_VRING_BASE GET_INFLIGHT_FD SET_INFLIGHT_FD REPLY_ACK").split(),
    },
    "cloud-hypervisor (migration)": {*_STATE.split()},
    "crosvm": {*(_VMM + "GET_QUEUE_NUM GET_VRING_BASE SET_BACKEND_REQ_FD").split()},
    "Firecracker": {*_VMM.split()},
    "libblkio": {
        *(_RINGS + "GET_QUEUE_NUM GET_CONFIG REPLY_ACK GET_MAX_MEM_SLOTS ADD_MEM_REG REM_MEM_REG EVENT_IDX").split(),
    },
    "rust-vmm's front-end": {*(_SET_UP + _SLOTS + _CRATE + "RESET_OWNER SET_LOG_FD BACKEND_CONFIG_CHANGE_MSG").split()},
    "DPDK's driver": {*(_DPDK + "INDIRECT_DESC").split()},
    "DPDK's driver (ring formats)": {"RING_PACKED", "IN_ORDER"},
    "qemu-storage-daemon": {
        *(_SET_UP + _SLOTS + "REM_MEM_REG SET_CONFIG SET_LOG_BASE LOG_ALL INDIRECT_DESC EVENT_IDX").split()
    },
    "DPDK's device": {
        *(_DPDK + "GET_QUEUE_NUM SET_VRING_ERR SET_BACKEND_REQ_FD SET_LOG_BASE LOG_ALL SEND_RARP NET_SET_MTU").split()
    },
    "rust-vmm's back-end": {*(_SET_UP + _SLOTS + _CRATE + "GPU_SET_SOCKET").split()},
    "DPDK's device (ring formats)": {"RING_PACKED", "IN_ORDER"},
    "virtiofsd": {*(_SET_UP + _SLOTS + _STATE + "INDIRECT_DESC EVENT_IDX").split()},
    "passt": {
        *(_RINGS + "SET_MEM_TABLE SET_VRING_ERR SEND_RARP SET_LOG_BASE LOG_SHMFD LOG_ALL REPLY_ACK").split(),
    },
    "vhost-device-vsock": {*(_VMM + "GET_QUEUE_NUM SET_VRING_ERR REPLY_ACK EVENT_IDX").split()},
}

#: In which tests that is; `*` stands for several. From qemu-storage-daemon on they are back-ends, to which the driver
#: side speaks.
_TRACED = "test_docs_protocol_support.py::test_"
PEERS = {
    "QEMU": _TRACED + "a_guest_says_what_the_page_says_that_it_says",
    "UML": _TRACED + "a_guest_says_what_the_page_says_that_it_says",
    "QEMU (killed disk)": "devices/test_qemu.py::test_a_guest_notices_nothing_of_a_disk_that_is_killed_while_it_writes",
    "QEMU (ring formats)": "devices/test_qemu.py::test_linux_drives_the_rings_that_qemu_is_told_to_have",
    "QEMU (migration)": (
        "devices/test_migration.py::test_a_guest_migrates_under_load_and_its_memory_is_what_the_devices_wrote"
    ),
    "QEMU (device state)": "devices/test_migration.py::test_the_state_of_a_device_goes_along_or_the_guest_stays",
    "QEMU (postcopy)": (
        "devices/test_migration.py::"
        "test_a_guest_goes_on_before_its_memory_is_there_and_what_was_in_flight_is_done_there"
    ),
    "QEMU (IOMMU)": "devices/test_qemu_iommu.py::test_a_disk_behind_an_iommu_keeps_what_is_written",
    **dict.fromkeys(
        ["QEMU (input)", "QEMU (network)", "QEMU (crypto)", "QEMU (GPU)", "QEMU (windows)"],
        _TRACED + "a_front_end_of_qemu_says_what_the_page_says_that_it_says",
    ),
    "UML (ring formats)": "devices/test_packed.py::test_linux_drives_both_formats_in_any_order_and_in_its_own",
    "UML (in-band)": "test_in_band.py::test_a_guest_reads_random_numbers_in_band",
    "cloud-hypervisor": _TRACED + "a_monitor_says_what_the_page_says_that_it_says",
    "cloud-hypervisor (migration)": "devices/test_vmms.py::test_a_guest_migrates_with_a_disk_and_an_entropy_source",
    "crosvm": _TRACED + "a_monitor_says_what_the_page_says_that_it_says",
    "Firecracker": _TRACED + "a_monitor_says_what_the_page_says_that_it_says",
    "libblkio": _TRACED + "libblkio_says_what_the_page_says_that_it_says",
    "rust-vmm's front-end": "rust_vmm.rs::their_front_end_*",
    "DPDK's driver": _TRACED + "a_driver_of_dpdk_says_what_the_page_says_that_it_says",
    "DPDK's driver (ring formats)": "devices/test_dpdk.py::test_a_driver_of_dpdk_gets_and_sends_every_packet",
    "qemu-storage-daemon": _TRACED + "our_front_end_says_it_to_a_disk_that_nobody_here_wrote",
    "DPDK's device": _TRACED + "our_front_end_says_it_to_a_device_of_dpdk",
    "rust-vmm's back-end": "rust_vmm.rs::our_front_end_*",
    "DPDK's device (ring formats)": "devices/test_dpdk.py::test_our_driver_works_with_the_device_of_dpdk",
    **dict.fromkeys(
        ["virtiofsd", "passt", "vhost-device-vsock"],
        _TRACED + "our_front_end_says_it_to_devices_that_nobody_here_wrote",
    ),
}

#: What a device did behind each of QEMU's front-ends, and with which drivers: one of the tests, over QEMU's qtest
#: protocol, and Linux's own where a test boots it. The generic front-end is for types that have none of their own.
FRONT_ENDS = {
    "vhost-user-rng-pci": ("random numbers", "qtest, Linux"),
    "vhost-user-blk-pci": ("reads and writes", "qtest, Linux"),
    "vhost-user-test-device-pci (console)": ("output and input", "qtest, Linux"),
    "vhost-user-test-device-pci (windows)": ("shared memory, a host notifier, shared objects", "qtest"),
    "vhost-user-i2c-pci": ("reads and writes of a sensor", "qtest"),
    "vhost-user-gpio-pci": ("names and levels of lines, an interrupt", "qtest"),
    "vhost-user-spi-pci": ("a transfer", "qtest"),
    "vhost-user-rtc-pci": ("the time", "qtest"),
    "vhost-user-snd-pci": ("a stream is set up, and plays", "qtest"),
    "vhost-user-input-pci": ("what there is to type, keys, a lamp", "qtest, Linux"),
    "vhost-user-vsock-pci": ("connections, and bytes both ways", "qtest, Linux"),
    "vhost-user-scsi-pci": ("inquiry, reads and writes, errors", "qtest, SeaBIOS, Linux"),
    "vhost-user-fs-pci": ("a file is looked up and read", "qtest, Linux"),
    "vhost-user-gpu-pci": ("displays, an image, a cursor, on the socket that it is given", "qtest"),
    "virtio-net-pci": ("frames both ways, MTU, announcement", "qtest, Linux"),
    "virtio-crypto-pci": ("a session is made, used and closed", "qtest"),
}

#: In which tests that is.
DRIVERS = [
    "devices/test_qemu_front_ends.py::test_a_device_does_its_work_behind_each_front_end",
    "devices/test_qemu_front_ends.py::test_linux_has_its_own_drivers_for_them",
    "devices/test_qemu.py::test_devices_outlive_a_reboot_and_the_end_of_qemu",
]

SESSION = "test_session.py::test_"
FRONTEND = "test_frontend.py::test_"
ENDIAN = "test_cross_endian.py::test_"
EXTENSIONS = "test_extensions.py::test_"
WINDOWS = "test_windows.py::test_"
MIGRATION = "test_migration.py::test_"
POSTCOPY = "test_postcopy.py::test_"
INFLIGHT = "test_inflight.py::test_"
IOMMU = "test_iommu.py::test_"
IN_BAND = "test_in_band.py::test_"
RINGS = "test_rings.py::test_"
IOMMU_DRIVER = "test_iommu_driver.py::test_"
STATE = "test_device_state.py::test_"

_reply = SESSION + "a_request_with_a_reply_is_answered_once_with_the_flags_5"
_negotiated = FRONTEND + "everything_that_both_sides_know_is_negotiated"
_queue = FRONTEND + "a_queue_goes_on_where_it_stopped"
_setup = SESSION + "a_ring_can_be_set_up_in_any_order"
_slots = FRONTEND + "only_what_changes_is_said_to_a_back_end_with_slots"
_objects = WINDOWS + "objects_are_announced_found_and_forgotten"
_mapped = WINDOWS + "a_file_is_mapped_where_the_device_says_and_seen_by_the_driver"
_asked = WINDOWS + "the_device_asks_as_the_specification_says"
_in_band = IN_BAND + "our_own_front_end_works_in_band"
_suspended = INFLIGHT + "a_driver_suspends_a_queue_and_lets_it_go_on"
_formats = RINGS + "requests_go_around_rings_of_every_size"
_in_order = RINGS + "requests_are_given_back_in_the_order_that_was_agreed_on"
_killed = INFLIGHT + "every_request_completes_once_however_often_the_device_is_killed"
_big_endian = ENDIAN + "a_big_endian_ring_works"
_late = POSTCOPY + "a_device_works_on_a_ring_and_buffers_whose_pages_come_when_it_touches_them"
_provided = POSTCOPY + "pages_are_provided_as_the_device_touches_them"

SUPPORT = {
    "GET_FEATURES": Support(_reply, _negotiated),
    "SET_FEATURES": Support(SESSION + "features_without_bit_30_enable_every_ring", _negotiated),
    "SET_OWNER": Support(
        SESSION + "an_acknowledgement_is_sent_when_it_is_asked_for_before_anything_was_negotiated", _negotiated
    ),
    "RESET_OWNER": Support(SESSION + "reset_owner_disables_the_rings_and_forgets_nothing"),
    "SET_MEM_TABLE": Support(
        SESSION + "the_memory_table_is_replaced_while_the_ring_runs",
        FRONTEND + "memory_of_several_regions_goes_over_as_a_table",
    ),
    "SET_LOG_BASE": Support(
        MIGRATION + "after_the_reply_nothing_is_marked_in_the_log_of_before",
        MIGRATION + "a_log_is_swapped_while_requests_are_under_way",
    ),
    "SET_LOG_FD": Support(
        MIGRATION + "the_eventfd_is_told_of_marks",
        MIGRATION + "a_queue_that_starts_later_is_logged_and_marks_are_announced",
    ),
    "SET_VRING_NUM": Support(SESSION + "a_ring_works_at_the_ends_of_what_its_size_may_be", _queue),
    "SET_VRING_ADDR": Support(SESSION + "a_running_ring_takes_its_addresses_again_without_losing_its_place", _queue),
    "SET_VRING_BASE": Support(SESSION + "a_ring_starts_at_any_base_and_stops_there_again", _queue),
    "GET_VRING_BASE": Support(SESSION + "get_vring_base_answers_after_requests_in_flight_are_done", _queue),
    "SET_VRING_KICK": Support(SESSION + "a_kick_is_heard_from_every_kind_of_descriptor", _queue),
    "SET_VRING_CALL": Support(SESSION + "a_call_is_sent_to_every_kind_of_descriptor", _queue),
    "SET_VRING_ERR": Support(
        SESSION + "error_descriptors_tell_of_a_broken_ring_and_the_others_go_on",
        FRONTEND + "a_ring_that_the_back_end_reports_as_broken_is_not_waited_for",
    ),
    "GET_PROTOCOL_FEATURES": Support(_reply, _negotiated),
    "SET_PROTOCOL_FEATURES": Support(_setup, FRONTEND + "exactly_what_was_asked_for_is_negotiated"),
    "GET_QUEUE_NUM": Support(_reply, _negotiated),
    "SET_VRING_ENABLE": Support(
        SESSION + "a_ring_that_was_disabled_goes_on_where_it_was", FRONTEND + "a_queue_that_is_not_enabled_waits"
    ),
    "SEND_RARP": Support(
        EXTENSIONS + "the_address_to_announce_is_the_first_six_bytes",
        EXTENSIONS + "a_network_card_is_told_its_address_and_its_mtu",
    ),
    "NET_SET_MTU": Support(
        EXTENSIONS + "an_mtu_that_cannot_be_is_refused_before_the_device_sees_it",
        EXTENSIONS + "a_network_card_is_told_its_address_and_its_mtu",
    ),
    "SET_BACKEND_REQ_FD": Support(_asked, FRONTEND + "a_change_of_the_configuration_is_waited_for"),
    "IOTLB_MSG": Support(
        IOMMU + "everything_is_asked_for_once_with_what_it_is_for", IOMMU_DRIVER + "devices_work_behind_an_iommu"
    ),
    "SET_VRING_ENDIAN": Support(_big_endian, ENDIAN + "both_ends_speak_big_endian"),
    "GET_CONFIG": Support(_reply, FRONTEND + "configuration_is_read_and_written"),
    "SET_CONFIG": Support(
        "test_config.py::test_a_driver_writes_parts_of_a_field", FRONTEND + "configuration_is_read_and_written"
    ),
    "CREATE_CRYPTO_SESSION": Support(
        EXTENSIONS + "a_session_is_where_the_specification_puts_it", EXTENSIONS + "sessions_are_created_and_closed"
    ),
    "CLOSE_CRYPTO_SESSION": Support(
        EXTENSIONS + "sessions_are_created_and_closed", EXTENSIONS + "sessions_are_created_and_closed"
    ),
    "POSTCOPY_ADVISE": Support(_late, _provided),
    "POSTCOPY_LISTEN": Support(POSTCOPY + "steps_out_of_order_are_refused", _provided),
    "POSTCOPY_END": Support(_late, _provided),
    "GET_INFLIGHT_FD": Support(INFLIGHT + "a_record_is_a_sealed_file_of_zeros", _killed),
    "SET_INFLIGHT_FD": Support(INFLIGHT + "the_next_device_begins_with_what_was_in_flight", _killed),
    "GPU_SET_SOCKET": Support(
        EXTENSIONS + "a_device_draws_on_the_screen_that_it_is_given",
        EXTENSIONS + "a_device_draws_on_the_screen_that_it_is_given",
    ),
    "RESET_DEVICE": Support(
        SESSION + "reset_device_stops_and_disables_the_rings_and_keeps_the_rest",
        FRONTEND + "a_reset_ends_requests_and_the_device_can_be_used_again",
    ),
    "VRING_KICK": Support(IN_BAND + "the_first_kick_message_starts_the_ring_and_calls_are_messages", _in_band),
    "GET_MAX_MEM_SLOTS": Support(_reply, EXTENSIONS + "a_driver_shares_as_many_regions_as_the_device_has_slots"),
    "ADD_MEM_REG": Support(EXTENSIONS + "a_device_works_on_all_the_memory_slots_that_it_offers", _slots),
    "REM_MEM_REG": Support(SESSION + "regions_are_added_and_removed_while_the_ring_runs", _slots),
    "SET_STATUS": Support(
        SESSION + "status_is_kept_and_zero_resets_the_device", FRONTEND + "the_device_status_follows_the_driver"
    ),
    "GET_STATUS": Support(_reply, FRONTEND + "the_device_status_follows_the_driver"),
    "GET_SHARED_OBJECT": Support(_asked, _objects),
    "SET_DEVICE_STATE_FD": Support(
        STATE + "the_state_goes_through_a_socket_as_well", STATE + "what_one_device_saved_another_one_loads"
    ),
    "CHECK_DEVICE_STATE": Support(
        STATE + "the_loop_goes_on_and_the_check_waits_until_the_state_is_there",
        STATE + "what_one_device_saved_another_one_loads",
    ),
    "GET_SHMEM_CONFIG": Support(_asked, _mapped),
    "GET_VRING_BASE_SKIP_DRAIN": Support(
        INFLIGHT + "a_ring_is_suspended_at_once_and_takes_up_what_it_had_begun", _suspended
    ),
    "BACKEND_IOTLB_MSG": Support(
        IOMMU + "everything_is_asked_for_once_with_what_it_is_for", IOMMU_DRIVER + "devices_work_behind_an_iommu"
    ),
    "BACKEND_CONFIG_CHANGE_MSG": Support(
        "test_trace.py::test_what_the_back_end_asks_is_seen", FRONTEND + "a_change_of_the_configuration_is_waited_for"
    ),
    "BACKEND_VRING_HOST_NOTIFIER_MSG": Support(_asked, WINDOWS + "a_driver_notifies_by_the_page_that_the_device_gives"),
    "BACKEND_VRING_CALL": Support(IN_BAND + "the_first_kick_message_starts_the_ring_and_calls_are_messages", _in_band),
    "BACKEND_VRING_ERR": Support(
        IN_BAND + "a_ring_that_breaks_says_so_in_a_message",
        IN_BAND + "our_own_front_end_is_told_of_a_ring_that_broke",
    ),
    "BACKEND_SHARED_OBJECT_ADD": Support(_asked, _objects),
    "BACKEND_SHARED_OBJECT_REMOVE": Support(_objects, _objects),
    "BACKEND_SHARED_OBJECT_LOOKUP": Support(_asked, WINDOWS + "a_device_looks_up_an_object_of_somebody_else"),
    "BACKEND_SHMEM_MAP": Support(_asked, _mapped),
    "BACKEND_SHMEM_UNMAP": Support(_asked, _mapped),
}

#: Features that change what a message means, without one of their own; and those that are not offered, with the reason.
FEATURES = {
    "LOG_SHMFD": SUPPORT["SET_LOG_BASE"],
    "REPLY_ACK": Support(
        SESSION + "nothing_is_acknowledged_that_did_not_ask_for_it", FRONTEND + "a_refused_message_ends_nothing"
    ),
    "BACKEND_SEND_FD": Support(_asked, WINDOWS + "a_mapping_has_one_descriptor"),
    "GET_VRING_BASE_INFLIGHT": Support(INFLIGHT + "features_that_need_a_record_are_refused_without_it", _suspended),
    "GPA_ADDRESSES": Support(
        SESSION + "with_gpa_addresses_rings_are_at_guest_addresses", IOMMU_DRIVER + "gpa_addresses_are_used_on_request"
    ),
    "XEN_MMAP": Support(),
}

#: Features of rings and transport. Every other one is no.
TRANSPORT = {
    "LOG_ALL": SUPPORT["SET_LOG_BASE"],
    "INDIRECT_DESC": Support(
        SESSION + "an_indirect_table_is_followed", FRONTEND + "a_request_of_several_parts_arrives_in_order"
    ),
    "EVENT_IDX": Support(
        SESSION + "with_event_idx_the_device_says_for_which_entry_it_wants_a_kick",
        RINGS + "a_busy_queue_loses_nothing",
    ),
    "PROTOCOL_FEATURES": SUPPORT["GET_PROTOCOL_FEATURES"],
    "VERSION_1": Support(
        SESSION + "transport_features_that_front_ends_take_unasked_are_accepted",
        ENDIAN + "a_big_endian_queue_needs_a_legacy_driver_and_a_device_that_takes_it",
    ),
    "ACCESS_PLATFORM": SUPPORT["IOTLB_MSG"],
    "RING_PACKED": Support(_formats, _formats),
    "IN_ORDER": Support(_in_order, _in_order),
}

REFUSED = {
    "XEN_MMAP": (
        "never offered: guest memory is mapped from files, and Xen's needs its own devices; "
        f"`{EXTENSIONS}memory_of_xen_is_refused_with_a_reason`"
    ),
}

HEAD = """\
# What of the protocol is supported

Made by `python docs/protocol_support.py` from the tables of the core; do not edit it. The device side is what
`vhost_user.Device` serves, the driver side what `vhost_user.Frontend` does; every test is below `tests/`. "No" means
that it is not offered, and refused. "Seen with" are programs and crates that nobody here wrote: front-ends that say it
to a device of ours; to those from qemu-storage-daemon on, our front-end says it.
"""


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    """The whole page."""
    tables = messages()
    return "\n".join(
        [
            HEAD,
            *_section("Requests of the front-end", [row for row in tables if row.channel == "main"]),
            *_section("Requests of the back-end", [row for row in tables if row.channel == "back-end"]),
            *_features(tables),
            *_transport(),
            *_peers(),
            *_front_ends(),
        ]
    )


def _section(title: str, rows: list[MessageInfo]) -> list[str]:
    lines = [
        f"## {title}",
        "",
        "| id | message | needs | device side | driver side | seen with |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        needs = "" if row.gate == "always" else row.gate
        lines.append(f"| {row.id} | {row.name} | {needs} | {_cells(SUPPORT[row.name], {row.name})} |")
    return [*lines, ""]


def _features(tables: list[MessageInfo]) -> list[str]:
    lines = [
        "## Protocol features",
        "",
        "| bit | feature | device side | driver side | seen with |",
        "|---|---|---|---|---|",
    ]
    for feature in ProtocolFeature:
        name = str(feature.name)
        bit = feature.value.bit_length() - 1
        if name in REFUSED:
            lines.append(f"| {bit} | {name} | {REFUSED[name]} | no | |")
            continue
        gated = [row.name for row in tables if row.gate == name]
        support = FEATURES[name] if name in FEATURES else SUPPORT[gated[0]]
        lines.append(f"| {bit} | {name} | {_cells(support, {name, *gated})} |")
    return [*lines, ""]


def _transport() -> list[str]:
    lines = [
        "## Features of rings and transport",
        "",
        "The rest of Virtio's are between a driver and its front-end, or of legacy devices, and are not offered.",
        "",
        "| bit | feature | device side | driver side | seen with |",
        "|---|---|---|---|---|",
    ]
    for name, support in TRANSPORT.items():
        bit = TransportFeature[name].value.bit_length() - 1
        lines.append(f"| {bit} | {name} | {_cells(support, {name})} |")
    return [*lines, ""]


def _peers() -> list[str]:
    lines = [
        "## Real peers",
        "",
        "Where they were seen: each test starts the peer, and fails if it is missing. cloud-hypervisor, crosvm and",
        "Firecracker need KVM, and are not among Debian's packages: `tests/devices/vmms.py` says how to name them.",
        "",
    ]
    return [*lines, *[f"- {peer}: `{test}`" for peer, test in PEERS.items()], ""]


def _front_ends() -> list[str]:
    lines = [
        "## Front-ends of QEMU",
        "",
        "A device of ours does its work behind each of them. Where no Linux that a test boots in QEMU has a driver,",
        "the driver is one of the tests, which has QEMU's registers and memory by its qtest protocol. QEMU 11.1 asks",
        "for a shared object without its name (GET_SHARED_OBJECT), so that a look-up there is refused. In these tests:",
        "",
        *[f"- `{test}`" for test in DRIVERS],
        "",
        "| front-end | what was seen | drivers |",
        "|---|---|---|",
    ]
    return [*lines, *[f"| {name} | {seen} | {drivers} |" for name, (seen, drivers) in FRONT_ENDS.items()], ""]


def _cells(support: Support, names: set[str]) -> str:
    device = f"`{support.device}`" if support.device else "no"
    driver = f"`{support.driver}`" if support.driver else "no"
    return f"{device} | {driver} | {', '.join(peer for peer in PEERS if SEEN[peer] & names)}"


def named_tests() -> set[str]:
    """Every test that the page names."""
    all_support = [*SUPPORT.values(), *FEATURES.values(), *TRANSPORT.values()]
    named = {test for support in all_support for test in (support.device, support.driver) if test}
    return named | set(PEERS.values()) | set(DRIVERS) | {EXTENSIONS + "memory_of_xen_is_refused_with_a_reason"}


if __name__ == "__main__":
    main()
