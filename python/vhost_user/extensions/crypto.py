"""Sessions of crypto devices, which front-ends create and close by messages instead of the control queue."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from .._core import ProtocolFeature
from ..device import Device

#: Operations. Virtio 1.3, section 5.9.7.2.
CIPHER_CREATE_SESSION = 0x0002
AKCIPHER_CREATE_SESSION = 0x0404

_ASYMMETRIC_SERVICE = 4

_PARAMETERS = 1056
_SYMMETRIC = struct.Struct("=6I4B4x16x64s512s")
_ASYMMETRIC = struct.Struct("=4I8xII1024s")


@dataclass(frozen=True)
class SymmetricSession:
    """What a session for ciphers and hashes is to be like. The numbers are virtio's. Virtio 1.3, section 5.9.7.2.1."""

    cipher: int = 0
    key: bytes = b""
    """Up to 64 bytes."""
    direction: int = 1
    """1 encrypts, 2 decrypts."""
    kind: int = 1
    """1 is a cipher, 2 a chain of a cipher and a hash."""
    hash: int = 0
    hash_length: int = 0
    """Bytes of the result."""
    hash_mode: int = 0
    authentication_key: bytes = b""
    """Up to 512 bytes."""
    additional_length: int = 0
    """Bytes of additional authenticated data."""
    chain_order: int = 0
    operation: int = CIPHER_CREATE_SESSION

    def pack(self) -> bytes:
        """As it is in the message, between the operation and the number of the session.

        Raises:
            ValueError: a key is too long.
        """
        _check("key", self.key, 64)
        _check("authentication key", self.authentication_key, 512)
        lengths = self.cipher, len(self.key), self.hash, self.hash_length, len(self.authentication_key)
        kinds = self.kind, self.direction, self.hash_mode, self.chain_order
        packed = _SYMMETRIC.pack(*lengths, self.additional_length, *kinds, self.key, self.authentication_key)
        return packed.ljust(_PARAMETERS, b"\0")

    @classmethod
    def unpack(cls, operation: int, parameters: bytes) -> Self:
        """Raises ValueError if a key is longer than there is room for it."""
        *head, key, other = _SYMMETRIC.unpack_from(parameters)
        cipher, key_length, hash_, hash_length, other_length, additional, kind, direction, mode, order = head
        return cls(
            cipher=cipher,
            key=_cut("key", key, key_length),
            direction=direction,
            kind=kind,
            hash=hash_,
            hash_length=hash_length,
            hash_mode=mode,
            authentication_key=_cut("authentication key", other, other_length),
            additional_length=additional,
            chain_order=order,
            operation=operation,
        )


@dataclass(frozen=True)
class AsymmetricSession:
    """What a session for public-key ciphers is to be like. Virtio 1.3, section 5.9.7.2.1."""

    algorithm: int = 0
    key_type: int = 1
    """1 is a public key, 2 a private one."""
    key: bytes = b""
    """Up to 1024 bytes."""
    rsa_padding: int = 0
    rsa_hash: int = 0
    operation: int = AKCIPHER_CREATE_SESSION

    def pack(self) -> bytes:
        """As it is in the message, between the operation and the number of the session.

        Raises:
            ValueError: the key is too long.
        """
        _check("key", self.key, 1024)
        head = self.algorithm, self.key_type, len(self.key), 0
        return _ASYMMETRIC.pack(*head, self.rsa_padding, self.rsa_hash, self.key)

    @classmethod
    def unpack(cls, operation: int, parameters: bytes) -> Self:
        """Raises ValueError if the key is longer than there is room for it."""
        algorithm, key_type, length, _, padding, hash_, key = _ASYMMETRIC.unpack_from(parameters)
        return cls(algorithm, key_type, _cut("key", key, length), padding, hash_, operation)


class CryptoSessions(Device, offers=ProtocolFeature.CRYPTO_SESSION):
    """A crypto device, whose front-end has taken the control queue over.

    QEMU's ``cryptodev-vhost-user`` is such a front-end. It never enables the ring of the data queue, which begins
    enabled, therefore, when CRYPTO_SESSION was negotiated. And it does not tell the device which features of rings its
    driver uses: switch them off there (``-device virtio-crypto-pci,event_idx=off,indirect_desc=off,...``), as
    :class:`vhost_user.guest.Qemu` does.

    vhost-user specification, VHOST_USER_CREATE_CRYPTO_SESSION.
    """

    def create_session(self, session: SymmetricSession | AsymmetricSession) -> int:
        """Make a session. Returns the number by which the driver will name it, which is not negative.

        Raise if there can be none.
        """
        raise NotImplementedError(f"{type(self).__name__} must define create_session()")

    def close_session(self, number: int) -> None:
        """Forget a session. Raise if there is none of this number."""
        raise NotImplementedError(f"{type(self).__name__} must define close_session()")

    def _create_session(self, operation: int, parameters: bytes) -> int:
        kind = AsymmetricSession if operation >> 8 == _ASYMMETRIC_SERVICE else SymmetricSession
        return self.create_session(kind.unpack(operation, parameters))


def _check(what: str, data: bytes, room: int) -> None:
    if len(data) > room:
        raise ValueError(f"the {what} has {len(data)} bytes; there is room for {room}")


def _cut(what: str, data: bytes, length: int) -> bytes:
    if length > len(data):
        raise ValueError(f"the {what} has {length} bytes by its own words; there is room for {len(data)}")
    return data[:length]
