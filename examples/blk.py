"""A disk of 64 MB in memory: /dev/vda in the guest."""

from vhost_user.devices import Blk

if __name__ == "__main__":
    Blk(64 << 20, serial="memory").serve("/tmp/blk.sock")
