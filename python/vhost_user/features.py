"""What is known of device types: names of their feature bits, and the fields of their configuration spaces.

    >>> TYPES[DeviceId.BLOCK].feature_names(1 << 9 | 1 << 32)
    ['FLUSH', 'VERSION_1']

Virtio 1.3, section 5, and the drivers of Linux where they are ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import config
from ._core import ProtocolFeature, TransportFeature
from .config import Field, Layout
from .ids import DeviceId

#: Bits 24 to 41 belong to the transport and the rings, in every device type. Virtio 1.3, section 6.
TRANSPORT_BITS = range(24, 42)


@dataclass(frozen=True)
class DeviceType:
    """A device type, as far as a look from outside goes."""

    id: int
    """The number that identifies it."""
    name: str
    """What it is called on command lines."""
    features: Mapping[int, str] = field(default_factory=dict)
    """Names of its own feature bits."""
    layout: Layout | None = None
    """Its configuration space, if it has one."""
    queues: tuple[str, ...] = ()
    """Its first queues, by index."""

    def feature_names(self, features: int) -> list[str]:
        """The names of the bits of `features`, "bit N" for those that have none."""
        return [self.feature_name(bit) for bit in range(64) if features >> bit & 1]

    def feature_name(self, bit: int) -> str:
        """The name of a feature bit."""
        if bit in TRANSPORT_BITS:
            return _flag_name(TransportFeature, bit)
        return self.features.get(bit, f"bit {bit}")

    def decode_config(self, space: bytes) -> dict[str, Any]:
        """The values of the fields that are whole in `space`, by name."""
        fields = self.layout.fields if self.layout else []
        return {each.name: _value(each, space) for each in fields if each.offset + each.size <= len(space)}


def protocol_feature_names(features: int) -> list[str]:
    """The names of protocol features, "bit N" for those that have none."""
    return [_flag_name(ProtocolFeature, bit) for bit in range(64) if features >> bit & 1]


def by_name(name: str) -> DeviceType:
    """The device type of a name such as "blk", or of a number.

    Raises:
        KeyError: there is none.
    """
    for known in TYPES.values():
        if name.lower() in {known.name, DeviceId(known.id).name.lower()}:
            return known
    if name.isdecimal() and 0 < int(name) < 1 << 32:
        return TYPES.get(int(name), DeviceType(int(name), name))
    raise KeyError(name)


@dataclass(frozen=True)
class Sight:
    """What a back-end shows, from which its type may be plain."""

    features: int
    """Without the bits of the transport."""
    queues: int | None
    """As GET_QUEUE_NUM answers."""
    space: bytes
    """The configuration space, and zeroes perhaps; empty without the protocol feature CONFIG."""
    exact: bool
    """Whether the back-end refused to give more of it."""


def guess(sight: Sight) -> tuple[DeviceType, str] | None:
    """The only device type that a back-end can be, and why; None if that is not plain."""
    found = [(TYPES[id_], why) for id_, (why, fits) in _SIGNS.items() if fits(sight)]
    return found[0] if len(found) == 1 else None


def _flag_name(flags: type[ProtocolFeature] | type[TransportFeature], bit: int) -> str:
    try:
        return flags(1 << bit).name or f"bit {bit}"
    except ValueError:
        return f"bit {bit}"


def _value(declared: Field[Any], space: bytes) -> Any:
    value = declared.decode(space[declared.offset : declared.offset + declared.size])
    if not isinstance(value, bytes):
        return value
    if declared.name == "mac":
        return value.hex(":")
    if declared.name == "tag":
        return value.rstrip(b"\0").decode(errors="backslashreplace")
    return value.hex(" ")


def _layout(declaration: type) -> Layout:
    fields = [value for value in vars(declaration).values() if isinstance(value, Field)]
    return Layout(declaration.__name__, fields)


def _bits(names: str) -> dict[int, str]:
    """``"0 CSUM, 3 MTU"`` as a table."""
    return {int(bit): name for bit, name in (pair.split() for pair in names.split(","))}


# --- Configuration spaces ---------------------------------------------------------------------------------------------


class _Net:
    mac = config.raw(6)
    status = config.u16()
    max_virtqueue_pairs = config.u16()
    mtu = config.u16()
    speed = config.u32()
    duplex = config.u8()
    rss_max_key_size = config.u8()
    rss_max_indirection_table_length = config.u16()
    supported_hash_types = config.u32()


class _Blk:
    capacity = config.u64()
    size_max = config.u32()
    seg_max = config.u32()
    cylinders = config.u16()
    heads = config.u8()
    sectors = config.u8()
    blk_size = config.u32()
    physical_block_exp = config.u8()
    alignment_offset = config.u8()
    min_io_size = config.u16()
    opt_io_size = config.u32()
    wce = config.u8(writable=True)
    num_queues = config.u16(offset=34)
    max_discard_sectors = config.u32()
    max_discard_seg = config.u32()
    discard_sector_alignment = config.u32()
    max_write_zeroes_sectors = config.u32()
    max_write_zeroes_seg = config.u32()
    write_zeroes_may_unmap = config.u8()
    max_secure_erase_sectors = config.u32(offset=60)
    max_secure_erase_seg = config.u32()
    secure_erase_sector_alignment = config.u32()
    zone_sectors = config.u32()
    max_open_zones = config.u32()
    max_active_zones = config.u32()
    max_append_sectors = config.u32()
    write_granularity = config.u32()
    zoned_model = config.u8()


class _Console:
    cols = config.u16()
    rows = config.u16()
    max_nr_ports = config.u32()
    emerg_wr = config.u32()


class _Balloon:
    num_pages = config.u32()
    actual = config.u32(writable=True)
    free_page_hint_cmd_id = config.u32()
    poison_val = config.u32(writable=True)


class _Input:
    select = config.u8(writable=True)
    subsel = config.u8(writable=True)
    size = config.u8()
    data = config.raw(128, offset=8)


class _Vsock:
    guest_cid = config.u64()


class _Sound:
    jacks = config.u32()
    streams = config.u32()
    chmaps = config.u32()
    controls = config.u32()


class _Fs:
    tag = config.raw(36)
    num_request_queues = config.u32()


class _Can:
    status = config.u16()


class _Gpio:
    ngpio = config.u16()
    gpio_names_size = config.u32(offset=4)


class _Spi:
    cs_max_number = config.u8()
    cs_change_supported = config.u8()
    tx_nbits = config.u8()
    rx_nbits = config.u8()
    bits_per_word_mask = config.u32()
    mode_func = config.u32()
    max_freq_hz = config.u32()
    max_word_delay_ns = config.u32()
    max_cs_setup_ns = config.u32()
    max_cs_hold_ns = config.u32()
    max_cs_inactive_ns = config.u32()


# --- The table --------------------------------------------------------------------------------------------------------

_NET_FEATURES = _bits(
    "0 CSUM, 1 GUEST_CSUM, 2 CTRL_GUEST_OFFLOADS, 3 MTU, 5 MAC, 6 GSO, 7 GUEST_TSO4, 8 GUEST_TSO6, 9 GUEST_ECN,"
    "10 GUEST_UFO, 11 HOST_TSO4, 12 HOST_TSO6, 13 HOST_ECN, 14 HOST_UFO, 15 MRG_RXBUF, 16 STATUS, 17 CTRL_VQ,"
    "18 CTRL_RX, 19 CTRL_VLAN, 20 CTRL_RX_EXTRA, 21 GUEST_ANNOUNCE, 22 MQ, 23 CTRL_MAC_ADDR, 50 DEVICE_STATS,"
    "52 VQ_NOTF_COAL, 53 NOTF_COAL, 54 GUEST_USO4, 55 GUEST_USO6, 56 HOST_USO, 57 HASH_REPORT, 59 GUEST_HDRLEN,"
    "60 RSS, 61 RSC_EXT, 62 STANDBY, 63 SPEED_DUPLEX"
)
_BLK_FEATURES = _bits(
    "0 BARRIER, 1 SIZE_MAX, 2 SEG_MAX, 4 GEOMETRY, 5 RO, 6 BLK_SIZE, 7 SCSI, 9 FLUSH, 10 TOPOLOGY, 11 CONFIG_WCE,"
    "12 MQ, 13 DISCARD, 14 WRITE_ZEROES, 16 SECURE_ERASE, 17 ZONED"
)
_BALLOON_FEATURES = _bits(
    "0 MUST_TELL_HOST, 1 STATS_VQ, 2 DEFLATE_ON_OOM, 3 FREE_PAGE_HINT, 4 PAGE_POISON, 5 REPORTING"
)
_CAN_FEATURES = _bits("0 CAN_CLASSIC, 1 CAN_FD, 2 RTR_FRAMES, 3 LATE_TX_ACK")
_D = DeviceId

#: The device types that vhost-user back-ends are known for, by number.
TYPES: dict[int, DeviceType] = {
    known.id: known
    for known in (
        DeviceType(_D.NET, "net", _NET_FEATURES, _layout(_Net), ("receiveq", "transmitq")),
        DeviceType(_D.BLOCK, "blk", _BLK_FEATURES, _layout(_Blk), ("requestq",)),
        DeviceType(
            _D.CONSOLE,
            "console",
            _bits("0 SIZE, 1 MULTIPORT, 2 EMERG_WRITE"),
            _layout(_Console),
            ("receiveq", "transmitq"),
        ),
        DeviceType(_D.RNG, "rng", {}, None, ("requestq",)),
        DeviceType(_D.MEMORY_BALLOON, "balloon", _BALLOON_FEATURES, _layout(_Balloon), ("inflateq", "deflateq")),
        DeviceType(_D.RTC, "rtc", _bits("0 ALARM"), None, ("requestq", "alarmq")),
        DeviceType(_D.INPUT, "input", {}, _layout(_Input), ("eventq", "statusq")),
        DeviceType(
            _D.VSOCK,
            "vsock",
            _bits("0 STREAM, 1 SEQPACKET, 2 NO_IMPLIED_STREAM"),
            _layout(_Vsock),
            ("rx", "tx", "event"),
        ),
        DeviceType(_D.SOUND, "sound", _bits("0 CTLS"), _layout(_Sound), ("controlq", "eventq", "txq", "rxq")),
        DeviceType(_D.FS, "fs", _bits("0 NOTIFICATION"), _layout(_Fs), ("hiprio", "requestq")),
        DeviceType(_D.SCMI, "scmi", _bits("0 P2A_CHANNELS, 1 SHARED_MEMORY"), None, ("cmdq", "eventq")),
        DeviceType(_D.I2C_ADAPTER, "i2c", _bits("0 ZERO_LENGTH_REQUEST"), None, ("requestq",)),
        DeviceType(_D.CAN, "can", _CAN_FEATURES, _layout(_Can), ("txq", "rxq", "controlq")),
        DeviceType(_D.GPIO, "gpio", _bits("0 IRQ"), _layout(_Gpio), ("requestq", "eventq")),
        DeviceType(_D.SPI, "spi", {}, _layout(_Spi), ("requestq",)),
    )
}

#: What a back-end is called whose type is not known.
UNKNOWN = DeviceType(0, "unknown")


# --- What makes a type plain ------------------------------------------------------------------------------------------


def _is_blk(sight: Sight) -> bool:
    if len(sight.space) < 60 or sight.features & ~_mask(_BLK_FEATURES) or not sight.features & (1 << 9 | 1 << 6):
        return False
    fields = TYPES[DeviceId.BLOCK].decode_config(sight.space)
    has_size = sight.features >> 6 & 1
    block: int = fields["blk_size"]
    return fields["capacity"] > 0 and (not has_size or (block >= 512 and block & (block - 1) == 0))


def _is_net(sight: Sight) -> bool:
    # MRG_RXBUF, STATUS and CTRL_VQ: nobody else has these bits.
    return bool(sight.features & (1 << 15 | 1 << 18)) and not sight.features & ~_mask(_NET_FEATURES)


def _is_fs(sight: Sight) -> bool:
    if len(sight.space) < 40 or sight.features & ~1:
        return False
    tag, _, rest = sight.space[:36].partition(b"\0")
    queues = int.from_bytes(sight.space[36:40], "little")
    return bool(tag) and tag.isascii() and tag.decode().isprintable() and not any(rest) and 0 < queues < 256


def _is_vsock(sight: Sight) -> bool:
    cid = int.from_bytes(sight.space[:8], "little")
    return sight.exact and len(sight.space) == 8 and 3 <= cid < 1 << 32 and not sight.features & ~7


def _is_console(sight: Sight) -> bool:
    if len(sight.space) < 12 or sight.features & ~7 or not sight.features & 1:
        return False
    fields = TYPES[DeviceId.CONSOLE].decode_config(sight.space)
    return 0 < fields["cols"] < 1000 and 0 < fields["rows"] < 1000 and not any(sight.space[12:])


def _mask(names: Mapping[int, str]) -> int:
    return sum(1 << bit for bit in names)


_SIGNS: dict[int, tuple[str, Callable[[Sight], bool]]] = {
    DeviceId.BLOCK: ("its features and configuration are those of a disk", _is_blk),
    DeviceId.NET: ("its features are those of a network device", _is_net),
    DeviceId.FS: ("its configuration begins with a tag and a number of queues", _is_fs),
    DeviceId.VSOCK: ("its configuration is a context identifier", _is_vsock),
    DeviceId.CONSOLE: ("its features and configuration are those of a console", _is_console),
}
