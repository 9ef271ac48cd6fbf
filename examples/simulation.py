"""Half an hour with a sensor that gets warmer, in a few seconds."""

from vhost_user.devices import Tmp102, i2c
from vhost_user.simulation import Simulation

if __name__ == "__main__":
    with Simulation() as simulation:
        sensor = Tmp102()
        bus = simulation.add(i2c.Adapter(sensor))

        def warm() -> None:
            sensor.celsius += 0.5
            bus.loop.call_later(300, warm)

        bus.loop.call_later(300, warm)
        guest = simulation.boot_uml()
        guest.run("echo tmp102 0x48 > /sys/bus/i2c/devices/i2c-0/new_device; sleep 1")
        for _ in range(3):
            celsius = guest.run("sleep 600; cat /sys/class/hwmon/hwmon0/temp1_input").text
            print(f"{simulation.now:.0f} s: {celsius}")
