"""What can go wrong, by class. Every message says what was expected, what came, and on which message or queue."""


class VhostUserError(Exception):
    """The base of every exception that this package defines."""


class DeclarationError(VhostUserError, TypeError):
    """A device class declares something that no device can have."""


class StateError(VhostUserError, RuntimeError):
    """The device, the queue or the connection is not in a state in which this is possible."""


class AddressInUse(VhostUserError, OSError):
    """Another process is listening at the path, or something that is not a socket is there."""


class ProtocolError(VhostUserError):
    """The peer broke the protocol, or a driver broke its ring. The connection, or the queue, is over."""


class PeerClosed(VhostUserError, ConnectionError):
    """The peer closed the connection."""


class PeerTimeout(VhostUserError, TimeoutError):
    """The peer did not answer, or did not read, in time."""


class StateTooLong(VhostUserError, ValueError):
    """A device has more state of its own than it may have."""


class QueueFull(VhostUserError):
    """The driver has offered no buffer to push into, and the backlog is full."""


class RequestError(VhostUserError):
    """A request cannot be worked on in this way."""


class RequestOverflow(RequestError, ValueError):
    """More was to be written than the driver left room for. Nothing was written."""


class RequestUnderflow(RequestError, ValueError):
    """More was to be read than the driver sent. Nothing was read."""


class RequestCompleted(RequestError):
    """The request was completed before: it is the driver's again."""


class RequestRevoked(RequestError):
    """The driver that made the request is gone, or took its queue away at once: by a reset, or with its front-end."""
