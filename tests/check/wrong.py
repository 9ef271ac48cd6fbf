"""Disks that are wrong on purpose, and the checks that must say so. Overrides have the types of what they override."""

# mypy: allow-untyped-defs

from __future__ import annotations

import os
import select
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable

from check.backend import EVENT_IDX, NEED_REPLY, Broken, Crash, Refused, Session

#: Every wrong disk, and what must fail it.
WRONG: list[tuple[type[Session], tuple[str, ...]]] = []


def fails(*checks: str) -> Callable[[type[Session]], type[Session]]:
    def register(kind: type[Session]) -> type[Session]:
        WRONG.append((kind, checks))
        return kind

    return register


# --- Framing ----------------------------------------------------------------------------------------------------------


@fails("framing.silent-on-connect")
class SaysHello(Session):
    def begin(self) -> None:
        self.send(1, 5, bytes(8))


@fails("framing.reply-id", "framing.in-order", "framing.pipelined")
class AnswersAsAnother(Session):
    def answer(self, request, flags, payload):
        self.send(request + 1, 5, payload)


@fails("framing.reply-flags", "framing.reply-without-need-reply")
class AnswersWithoutTheFlag(Session):
    def answer(self, request, flags, payload):
        self.send(request, 1, payload)


@fails("framing.reply-size")
class AnswersWithADescriptor(Session):
    def answer(self, request, flags, payload):
        socket.send_fds(self.socket, [struct.pack("=III", request, 5, len(payload)) + payload], [self.until])


@fails("framing.no-unasked-answer")
class AcknowledgesEverything(Session):
    def handle(self, request, flags, payload, descriptors):
        return super().handle(request, flags | NEED_REPLY, payload, descriptors)


@fails("framing.acknowledgement")
class AcknowledgesInFourBytes(Session):
    def acknowledge(self, request, flags, status):
        self.send(request, 5, bytes(4))


@fails("framing.acknowledgement-when-features-are-set", "features.protocol-first")
class WantsMoreThanAcknowledgements(Session):
    def set_protocol_features(self, payload, descriptors):
        if struct.unpack("=Q", payload)[0] == 1 << 3:
            raise Refused


@fails("framing.one-answer", "config.one-answer")
class AnswersTwice(Session):
    def answer(self, request, flags, payload):
        super().answer(request, flags, payload)
        if flags & NEED_REPLY:
            self.acknowledge(request, flags, 0)


@fails("framing.pipelined")
class ReadsTooMuch(Session):
    def handle(self, request, flags, payload, descriptors):
        if request == 3 and select.select([self.socket], [], [], 0)[0]:
            self.socket.recv(4096)
        return super().handle(request, flags, payload, descriptors)


@fails("framing.header-in-pieces", "framing.payload-in-pieces")
class ReadsOnce(Session):
    def receive(self, size):
        data, descriptors, _, _ = socket.recv_fds(self.socket, size, 16) if size else (b"", [], 0, 0)
        return data, descriptors


@fails("framing.version")
class AnswersAnyVersion(Session):
    def is_request(self, flags):
        return True

    def answer(self, request, flags, payload):
        self.send(request, flags | 4, payload)


@fails("framing.reply-is-no-request")
class DiesOfAReply(Session):
    def is_request(self, flags):
        if flags & 4:
            raise Crash
        return super().is_request(flags)


# --- Features ---------------------------------------------------------------------------------------------------------


@fails("features.constant")
class OffersLessLater(Session):
    def get_features(self, payload, descriptors):
        return struct.pack("=Q", self.features if self.set is None else self.features & ~EVENT_IDX)


@fails("features.version-1")
class IsLegacy(Session):
    features = Session.features & ~(1 << 32)


@fails("features.protocol-features")
class TellsTooMuch(Session):
    def get_protocol_features(self, payload, descriptors):
        return bytes(16)


@fails("features.accepted")
class RefusesWhatItOffers(Session):
    def set_features(self, payload, descriptors):
        if struct.unpack("=Q", payload)[0] & EVENT_IDX:
            raise Refused


@fails("features.none")
class InsistsOnItsFeatures(Session):
    def set_features(self, payload, descriptors):
        if not struct.unpack("=Q", payload)[0] & (1 << 6):
            raise Refused


@fails("features.again")
class SetsFeaturesOnce(Session):
    def set_features(self, payload, descriptors):
        if self.set is not None:
            raise Refused
        super().set_features(payload, descriptors)


@fails("features.protocol-constant")
class ChangesItsMind(Session):
    asked = 0

    def get_protocol_features(self, payload, descriptors):
        self.asked += 1
        return struct.pack("=Q", self.protocol if self.asked == 1 else 0)


@fails("features.protocol-accepted")
class RefusesAllAtOnce(Session):
    def set_protocol_features(self, payload, descriptors):
        if struct.unpack("=Q", payload)[0] == self.protocol:
            raise Refused


@fails("features.inband-needs")
class OffersInbandAlone(Session):
    protocol = 1 << 3 | 1 << 14


@fails("features.queue-count")
class HasNoQueues(Session):
    def get_queue_num(self, payload, descriptors):
        return bytes(8)


@fails("features.protocol-first")
class WantsItsOwnerFirst(Session):
    learned = False

    def set_protocol_features(self, payload, descriptors):
        super().set_protocol_features(payload, descriptors)
        self.learned = True

    def set_owner(self, payload, descriptors):
        if self.learned:
            raise Refused


@fails("features.reset-owner")
class DiesOfItsAge(Session):
    def reset_owner(self, payload, descriptors):
        raise Crash


@fails("features.status")
class ForgetsTheStatus(Session):
    def get_status(self, payload, descriptors):
        return bytes(8)


@fails("features.status-reset")
class CannotBeReset(Session):
    def set_status(self, payload, descriptors):
        self.status_word |= struct.unpack("=Q", payload)[0]


@fails("features.reset-device")
class RefusesToReset(Session):
    def reset_device(self, payload, descriptors):
        raise Refused


# --- Messages that should be refused ----------------------------------------------------------------------------------


@fails(
    "features.not-offered", "features.protocol-not-offered", "memory.region-past-end-of-file",
    "memory.region-of-no-size", "memory.region-wraps", "memory.regions-overlap", "memory.remove-unknown",
    "memory.add-twice", "config.set-past-end", "errors.request-0", "errors.index-of-get-vring-base",
    "errors.ring-of-no-entries", "errors.ring-of-seven", "errors.ring-of-65536", "errors.addresses-nowhere",
    "errors.addresses-not-aligned", "errors.surplus-descriptor", "errors.payload-too-short",
    "errors.payload-too-long", "errors.enable-2", "errors.base-of-17-bits", "inflight.set-past-end-of-file",
    "inflight.set-too-small",
)  # fmt: skip
class SulksWhenItRefuses(Session):
    def handle(self, request, flags, payload, descriptors):
        return super().handle(request, flags, payload, descriptors) or True

    def acknowledge(self, request, flags, status):
        if not status:
            super().acknowledge(request, flags, status)


@fails(
    "memory.table-without-descriptors", "memory.table-cut-short", "memory.table-of-thousands",
    "memory.add-without-descriptor", "errors.unknown-request", "errors.index-of-vring-num",
    "errors.index-of-vring-base", "errors.index-of-vring-addr", "errors.index-of-vring-enable",
    "errors.kick-without-descriptor", "errors.call-without-descriptor", "in-band.no-such-ring",
)  # fmt: skip
class AcceptsEverything(Session):
    def acknowledge(self, request, flags, status):
        super().acknowledge(request, flags, 0)


@fails("errors.ring-nowhere-is-started")
class FollowsAnyAddress(Session):
    def user(self, address, size):
        try:
            return super().user(address, size)
        except Broken:
            raise Crash from None


@fails("errors.four-gigabytes")
class BelievesAnySize(Session):
    def hang_up(self, descriptors):
        self.send(2, 5, bytes(8))
        return True


# --- Memory -----------------------------------------------------------------------------------------------------------


@fails("memory.table")
class HasNoTable(Session):
    def set_mem_table(self, payload, descriptors):
        raise Refused


@fails("memory.eight-regions")
class HasFourRegions(Session):
    def set_mem_table(self, payload, descriptors):
        if len(descriptors) > 4:
            raise Refused
        super().set_mem_table(payload, descriptors)


@fails("memory.file-offset")
class IgnoresTheOffset(Session):
    def use(self, regions):
        for region in regions:
            region.offset = 0
        super().use(regions)


@fails("memory.two-regions")
class UsesTheFirstRegion(Session):
    def use(self, regions):
        super().use(regions[:1])


@fails("memory.table-replaced")
class KeepsTheFirstTable(Session):
    def use(self, regions):
        super().use(self.regions or regions)


@fails("memory.table-while-running")
class StopsForATable(Session):
    def use(self, regions):
        super().use(regions)
        for ring in self.rings:
            ring.started = False


@fails("memory.buffer-across-regions")
class WritesTheFirstPiece(Session):
    def write_guest(self, guest, data):
        memory, at, here = next(self.pieces(guest, len(data)))
        memory[at : at + here] = data[:here]


@fails("memory.slots")
class HasNoSlots(Session):
    def get_max_mem_slots(self, payload, descriptors):
        return bytes(8)


@fails("memory.add")
class AddsNothing(Session):
    def add_mem_reg(self, payload, descriptors):
        pass


@fails("memory.remove")
class RemovesNothing(Session):
    def rem_mem_reg(self, payload, descriptors):
        raise Refused


# --- Rings ------------------------------------------------------------------------------------------------------------


@fails("ring.completes-a-request")
class CannotRead(Session):
    def read_disk(self, sector, count):
        return bytes(count), 1


@fails("ring.used-once")
class CompletesTwice(Session):
    def finish(self, ring, head, written):
        super().finish(ring, head, written)
        super().finish(ring, head, written)


@fails("ring.used-length")
class Exaggerates(Session):
    def finish(self, ring, head, written):
        super().finish(ring, head, written + 1)


@fails("ring.writes-nothing-else")
class WritesOneByteMore(Session):
    def write_guest(self, guest, data):
        super().write_guest(guest, data + b"!")


@fails("ring.wraps-around")
class FillsTheRingOnce(Session):
    def finish(self, ring, head, written):
        if ring.next_used < ring.size:
            super().finish(ring, head, written)


@fails("ring.index-overflows")
class StopsAt65535(Session):
    def may_run(self, ring):
        return super().may_run(ring) and self.load(ring.addresses[2] + 2, "<H")[0] >= ring.next_avail


@fails("ring.many-at-once", "packed.many-at-once")
class DoesOnePerKick(Session):
    per_kick = 1


@fails("ring.smallest")
class HasLargeRings(Session):
    def set_vring_num(self, payload, descriptors):
        if payload[4] == 2:
            raise Refused
        super().set_vring_num(payload, descriptors)


@fails("ring.of-1024")
class SulksAtLargeRings(SulksWhenItRefuses):
    def set_vring_num(self, payload, descriptors):
        if struct.unpack("=II", payload)[1] > 512:
            raise Refused
        super().set_vring_num(payload, descriptors)


@fails("ring.base-is-used")
class StartsAtZero(Session):
    def set_vring_base(self, payload, descriptors):
        pass


@fails("ring.base-is-told")
class TellsAnotherBase(Session):
    def get_vring_base(self, payload, descriptors):
        super().get_vring_base(payload, descriptors)
        return payload


@fails("ring.base-of-a-stopped-ring")
class TellsAnotherIndex(Session):
    def get_vring_base(self, payload, descriptors):
        return bytes([9]) + super().get_vring_base(payload, descriptors)[1:]


@fails("ring.goes-on")
class BeginsAnew(Session):
    def set_vring_kick(self, payload, descriptors):
        self.rings[payload[0]].next_avail = 0
        super().set_vring_kick(payload, descriptors)


@fails("ring.stopped")
class CannotStop(Session):
    def stop(self, ring):
        pass


@fails("ring.disabled")
class SkipsWhatWaitedForIt(Session):
    def set_vring_enable(self, payload, descriptors):
        ring = self.ring(payload[0])
        assert ring.addresses is not None
        (ring.next_avail,) = self.load(ring.addresses[2] + 2, "<H")
        super().set_vring_enable(payload, descriptors)


@fails("ring.disabled-and-enabled")
class IsDisabledForEver(Session):
    def set_vring_enable(self, payload, descriptors):
        super().set_vring_enable(payload, descriptors)
        if not payload[4]:
            self.ring(payload[0]).size = 0


@fails("ring.enabled-from-the-start")
class NeedsToBeEnabled(Session):
    def set_features(self, payload, descriptors):
        (self.set,) = struct.unpack("=Q", payload)


@fails("ring.what-waits")
class SkipsWhatWaits(Session):
    def set_vring_kick(self, payload, descriptors):
        ring = self.rings[payload[0]]
        if ring.addresses:
            (ring.next_avail,) = self.load(ring.addresses[2] + 2, "<H")
        super().set_vring_kick(payload, descriptors)


@fails("ring.any-order", "notification.call-replaced")
class WantsTheCallFirst(Session):
    def set_vring_call(self, payload, descriptors):
        if self.ring(payload[0]).started:
            raise Refused
        super().set_vring_call(payload, descriptors)


@fails("ring.indirect")
class KnowsNoTables(Session):
    def chain(self, table, size, head):
        if self.rows(table, size)(head)[2] & 4:
            raise Broken
        return super().chain(table, size, head)


@fails("ring.indirect-and-direct")
class WantsTables(Session):
    def chain(self, table, size, head):
        if self.agreed & 1 << 28 and not self.rows(table, size)(head)[2] & 4:
            raise Broken
        return super().chain(table, size, head)


@fails("ring.any-pieces")
class WantsThreePieces(Session):
    def perform(self, readable, writable):
        if len(readable) != 1 or len(writable) != 2:
            raise Broken
        return super().perform(readable, writable)


@fails("ring.addresses-while-running")
class BeginsAtItsAddresses(Session):
    def set_vring_addr(self, payload, descriptors):
        super().set_vring_addr(payload, descriptors)
        self.ring(payload[0]).next_avail = 0


@fails("ring.two-rings")
class StopsAllRings(Session):
    def stop(self, ring):
        for each in self.rings:
            super().stop(each)


@fails("ring.feature-repeated-while-running")
class StopsForFeatures(Session):
    def set_features(self, payload, descriptors):
        super().set_features(payload, descriptors)
        for ring in self.rings:
            ring.started = False


# --- Notifications ----------------------------------------------------------------------------------------------------


@fails("notification.call", "packed.call")
class NeverNotifies(Session):
    def notify(self, ring):
        pass


@fails("notification.each-time")
class NotifiesOnce(Session):
    def wants_call(self, ring, before):
        return before == 0


@fails("notification.suppressed")
class WaitsForTheDriver(Session):
    def may_run(self, ring):
        return super().may_run(ring) and not self.load(ring.addresses[2], "<H")[0]


@fails("notification.used-event")
class MissesTheEvent(Session):
    def wants_call(self, ring, before):
        return not self.agreed & EVENT_IDX or ring.next_used == 1


@fails("notification.used-event-suppresses")
class WaitsForTheEvent(Session):
    def may_run(self, ring):
        if not super().may_run(ring):
            return False
        return not self.agreed & EVENT_IDX or self.load(ring.addresses[2] + 4 + 2 * ring.size, "<H")[0] < 50


@fails("notification.event-idx-ignores-the-flag")
class LooksAtTheFlag(Session):
    def wants_call(self, ring, before):
        return super().wants_call(ring, before) and not self.load(ring.addresses[2], "<H")[0]


@fails("notification.avail-event")
class WantsNoKicks(Session):
    def want_kicks(self, ring):
        pass


@fails("notification.no-notify")
class NeedsKicksItDoesNotWant(Session):
    def want_kicks(self, ring):
        super().want_kicks(ring)
        self.store(ring.addresses[1], "<H", 1)


@fails("notification.needless-kicks")
class CompletesKicks(Session):
    def kicked(self, ring):
        before = ring.next_used
        super().kicked(ring)
        if ring.next_used == before and before:
            self.finish(ring, 0, 0)


@fails("notification.no-call-descriptor")
class KeepsItsCall(Session):
    def set_vring_call(self, payload, descriptors):
        if descriptors:
            super().set_vring_call(payload, descriptors)


@fails("notification.call-replaced")
class KeepsItsFirstCall(Session):
    def set_vring_call(self, payload, descriptors):
        if self.ring(payload[0]).call < 0:
            super().set_vring_call(payload, descriptors)


@fails("notification.kick-replaced")
class KeepsItsFirstKick(Session):
    def set_vring_kick(self, payload, descriptors):
        if self.ring(payload[0]).kick < 0:
            super().set_vring_kick(payload, descriptors)


@fails("notification.no-kick-descriptor")
class NeedsAKick(Session):
    def set_vring_kick(self, payload, descriptors):
        if not descriptors:
            raise Crash
        super().set_vring_kick(payload, descriptors)


@fails("notification.on-a-socket")
class WritesFourBytes(Session):
    def notify(self, ring):
        if stat.S_ISSOCK(os.fstat(ring.call).st_mode):
            os.write(ring.call, bytes(4))
        else:
            super().notify(ring)


@fails("notification.none-after-stop")
class NotifiesLater(Session):
    def stop(self, ring):
        if ring.call >= 0:
            call = os.dup(ring.call)

            def notify() -> None:
                # More than once: the answer may take longer to arrive.
                for _ in range(50):
                    time.sleep(0.01)
                    os.eventfd_write(call, 1)
                os.close(call)

            threading.Thread(target=notify).start()
        super().stop(ring)


@fails("notification.back-end-channel")
class TalksOnItsChannel(Session):
    def set_backend_req_fd(self, payload, descriptors):
        super().set_backend_req_fd(payload, descriptors)
        os.write(self.channel or -1, bytes(12))


# --- Packed rings -----------------------------------------------------------------------------------------------------


@fails("packed.completes-requests")
class ReturnsTheSlot(Session):
    def buffer_id(self, ring, rows):
        return ring.used_slot


@fails("packed.wraps-around")
class NeverFlips(Session):
    def advance(self, ring, slot, wrap, count):
        return super().advance(ring, slot, wrap, count)[0], wrap


@fails("packed.odd-size")
class WrapsAtPowersOfTwo(Session):
    def set_vring_num(self, payload, descriptors):
        super().set_vring_num(payload, descriptors)
        ring = self.ring(payload[0])
        ring.size = 1 << (ring.size - 1).bit_length()


@fails("packed.indirect")
class TakesASlotForEachPiece(Session):
    def slots_of(self, rows):
        return rows[0][1] // 16 if rows[0][3] & 4 else len(rows)


@fails("packed.base-is-used")
class StartsAtTheFirst(Session):
    def set_positions(self, ring, base):
        super().set_positions(ring, 0x8000_8000)


@fails("packed.base-is-told")
class TellsNoWrapCounters(Session):
    def base(self, ring):
        return super().base(ring) & 0x7FFF_7FFF


@fails("packed.goes-on")
class StartsInTheFirstLap(Session):
    def set_positions(self, ring, base):
        super().set_positions(ring, base | 0x8000_8000)


@fails("packed.calls-disabled")
class WaitsUntilItMayCall(Session):
    def may_run(self, ring):
        return super().may_run(ring) and not (self.is_packed and self.load(ring.addresses[2] + 2, "<H")[0] == 1)


@fails("packed.call-at-a-descriptor")
class TakesEveryEventForTheNextLap(Session):
    def wants_call_packed(self, ring, used):
        return self.load(ring.addresses[2] + 2, "<H")[0] == 0


@fails("packed.kicks")
class WantsNoKickAndNeedsIt(Session):
    def want_kicks_packed(self, ring):
        self.store(ring.addresses[1], "<HH", 0, 1)


@fails("packed.kick-at-a-descriptor")
class WantsAKickALapLater(Session):
    def want_kicks_packed(self, ring):
        self.store(ring.addresses[1], "<HH", (ring.wrap ^ 1) << 15 | ring.slot, 2)


@fails("packed.chain-without-end")
class DiesOfALap(Session):
    def packed_rows(self, ring):
        try:
            return super().packed_rows(ring)
        except Broken:
            raise Crash from None


# --- What is in flight ------------------------------------------------------------------------------------------------


@fails("inflight.layout", "inflight.layout-of-packed-rings")
class CountsNoEntries(Session):
    def get_inflight_fd(self, payload, descriptors):
        return struct.pack("=Q", 16) + super().get_inflight_fd(payload, descriptors)[8:]


@fails("inflight.zeroes")
class LeavesRubbish(Session):
    def new_record(self, size):
        return b"\xff" * size


@fails("inflight.is-kept")
class KeepsNoRecord(Session):
    def set_inflight_fd(self, payload, descriptors):
        pass


@fails("inflight.marks-are-cleared")
class LeavesItsMarks(Session):
    def end_request(self, ring, head):
        pass


@fails("inflight.resubmits")
class BeginsWithWhatIsAvailable(Session):
    def recover(self, ring, record):
        pass


@fails("inflight.knows-what-was-published")
class TrustsItsMarks(Session):
    def recover(self, ring, record):
        if record.header(ring)[0]:
            record.set_header(ring, 1, ring.size, 0, ring.next_used)
        super().recover(ring, record)


# --- What is dirty ----------------------------------------------------------------------------------------------------


@fails("log.data")
class LogsItsRings(Session):
    def log_data(self, guest, size):
        pass


@fails("log.used-ring")
class LogsTheFirstAddress(Session):
    def log_used(self, ring, at, size):
        self.mark(self.regions[0].guest + at, size)


@fails("log.packed")
class LogsSplitRings(Session):
    def log_used(self, ring, at, size):
        if not self.is_packed:
            super().log_used(ring, at, size)


@fails("log.nothing-else")
class MarksEverything(Session):
    def mark(self, guest, size):
        super().mark(0, guest + size)


@fails("log.off", "log.switched-off")
class LogsAlways(Session):
    def log_data(self, guest, size):
        self.mark(guest, size)


@fails("log.replaced")
class KeepsItsFirstLog(Session):
    def set_log_base(self, payload, descriptors):
        return super().set_log_base(payload, descriptors) if self.log is None else payload


@fails("log.smaller-than-memory")
class MarksBesideTheLog(Session):
    def mark(self, guest, size):
        if self.log is not None:
            self.log.map[-1] = 1


@fails("log.larger-than-its-file")
class DiesOfAShortLog(Session):
    def set_log_base(self, payload, descriptors):
        try:
            return super().set_log_base(payload, descriptors)
        except Refused:
            return payload

    def mark(self, guest, size):
        if self.log is None:
            raise Crash
        super().mark(guest, size)


@fails("log.descriptor")
class TakesNoDescriptor(Session):
    def set_log_fd(self, payload, descriptors):
        raise Refused


# --- The device's own state -------------------------------------------------------------------------------------------


@fails("state.saves")
class NeverEndsItsState(Session):
    def set_device_state_fd(self, payload, descriptors):
        self.loading = os.dup(descriptors[0])
        return super().set_device_state_fd(payload, descriptors)


@fails("state.loads")
class KnowsItsStateNoMore(Session):
    def check_device_state(self, payload, descriptors):
        return struct.pack("=Q", 1) if self.loading >= 0 else super().check_device_state(payload, descriptors)


@fails("state.goes-on-after-saving")
class GivesItselfAway(Session):
    saved = False

    def set_device_state_fd(self, payload, descriptors):
        self.saved = True
        return super().set_device_state_fd(payload, descriptors)

    def may_run(self, ring):
        return super().may_run(ring) and not self.saved


@fails("state.unknown-direction")
class SavesInAnyDirection(Session):
    def set_device_state_fd(self, payload, descriptors):
        return super().set_device_state_fd(bytes(8), descriptors)


# --- Kicks and calls that are messages --------------------------------------------------------------------------------


@fails("in-band.notifies")
class CallsBeforeItAnswers(Session):
    def vring_kick(self, payload, descriptors):
        super().vring_kick(payload, descriptors)
        self.look_at(self.ring(payload[0]))


@fails("in-band.descriptors-are-used")
class CallsByMessageOnly(Session):
    def notify(self, ring):
        if self.channel is not None:
            os.write(self.channel, struct.pack("=IIIII", 4, 1, 8, ring.index, 0))
        else:
            super().notify(ring)


# --- Configuration space ----------------------------------------------------------------------------------------------


@fails("config.read")
class TellsLess(Session):
    def get_config(self, payload, descriptors):
        return super().get_config(payload, descriptors)[:-1]


@fails("config.read-early")
class TellsLater(Session):
    def get_config(self, payload, descriptors):
        if self.set is None:
            raise Refused
        return super().get_config(payload, descriptors)


@fails("config.read-part", "config.read-far-past-end")
class TellsFromTheStart(Session):
    def get_config(self, payload, descriptors):
        return payload[:4] + super().get_config(bytes(4) + payload[4:], descriptors)[4:]


@fails("config.read-bytes")
class TellsWords(Session):
    def get_config(self, payload, descriptors):
        if (len(payload) - 12) % 4:
            raise Refused
        return super().get_config(payload, descriptors)


@fails("config.flags")
class HangsUpOnFlags(Session):
    def get_config(self, payload, descriptors):
        if payload[8]:
            raise ConnectionError
        return super().get_config(payload, descriptors)


@fails("config.read-past-end")
class TellsWhatIsThere(Session):
    def get_config(self, payload, descriptors):
        return payload[:12] + self.disk.config[240:250] if payload[0] == 240 else super().get_config(payload, [])[:]

    def check(self, name, payload, descriptors):
        super().check(name, payload, descriptors)
        self.disk.config = self.disk.config.ljust(245, b"\0")


@fails("config.size-is-a-lie")
class DiesOfALie(Session):
    def get_config(self, payload, descriptors):
        if payload[4] + 12 != len(payload):
            raise Crash
        return super().get_config(payload, descriptors)


@fails("config.read-only")
class CanBeResized(Session):
    def is_writable(self, at):
        return True


@fails("config.write-back")
class HasOneCache(Session):
    def is_writable(self, at):
        return False


@fails("config.disk")
class HasOddBlocks(Session):
    def begin(self):
        self.disk.config[20] = 7


# --- Robustness -------------------------------------------------------------------------------------------------------


@fails("robustness.cut-in-a-header", "robustness.cut-in-a-payload")
class DiesOfAnEnd(Session):
    def receive(self, size):
        data, descriptors = super().receive(size)
        if 0 < len(data) < size:
            raise Crash
        return data, descriptors


@fails("robustness.gone-before-the-answer", "robustness.does-not-read")
class DiesOfSigpipe(Session):
    def send(self, request, flags, payload):
        time.sleep(0.01)
        try:
            super().send(request, flags, payload)
        except OSError:
            raise Crash from None


@fails("robustness.next-connection")
class IsDistracted(Session):
    def get_features(self, payload, descriptors):
        waits = select.select([self.disk.listener], [], [], 0)[0]
        return bytes(8) if waits else super().get_features(payload, descriptors)


@fails("robustness.gone-while-running")
class RemembersItsLastDriver(Session):
    def end(self):
        self.disk.drivers += any(ring.started for ring in self.rings)
        super().end()

    def may_run(self, ring):
        return super().may_run(ring) and self.disk.drivers < 2


@fails("robustness.twenty-times")
class DiesOfTheTwelfth(Session):
    def begin(self):
        self.disk.connections += 1
        if self.disk.connections > 12:
            raise Crash


@fails("robustness.descriptors-are-closed")
class DiesOfADescriptor(Session):
    def end(self):
        died = any(ring.error >= 0 for ring in self.rings)
        super().end()
        if died:
            raise Crash


@fails(
    "robustness.descriptor-loop", "robustness.head-out-of-range", "robustness.next-out-of-range",
    "robustness.index-jumps", "robustness.buffer-nowhere", "robustness.buffer-over-the-end",
    "robustness.buffer-wraps", "robustness.buffer-of-4-gigabytes", "robustness.readable-after-writable",
    "robustness.no-bytes", "robustness.too-little-room", "robustness.indirect-in-indirect",
    "robustness.indirect-of-odd-size", "robustness.indirect-nowhere", "robustness.indirect-loop",
    "robustness.after-a-broken-ring", "robustness.memory-taken-away",
)  # fmt: skip
class DiesOfNonsense(Session):
    def give_up(self, ring):
        raise Crash


@fails("robustness.file-truncated")
class HangsWithoutMemory(Session):
    def kicked(self, ring):
        # Looking at a file that was cut off would kill this process, too.
        if self.regions and self.regions[0].file_size() == 0:
            select.select([self.until], [], [])
        else:
            super().kicked(ring)
