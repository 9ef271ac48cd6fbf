"""A temperature sensor on an I2C bus. Type a temperature, and the guest reads it; an empty line ends it.

# echo tmp102 0x48 > /sys/bus/i2c/devices/i2c-0/new_device
# cat /sys/class/hwmon/hwmon0/temp1_input
"""

import contextlib

from vhost_user.devices import Tmp102, i2c

if __name__ == "__main__":
    sensor = Tmp102()
    with i2c.Adapter(sensor).start("/tmp/i2c.sock"), contextlib.suppress(EOFError):
        while text := input("°C: "):
            sensor.celsius = float(text)
