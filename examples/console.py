"""A console in a pseudo-terminal: /dev/hvc0 in the guest."""

from vhost_user.devices import PtyConsole

if __name__ == "__main__":
    console = PtyConsole()
    print(f"screen {console.name}")
    console.serve("/tmp/console.sock")
