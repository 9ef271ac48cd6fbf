"""Virtio device types by number. Virtio 1.3, section 5."""

import enum


class DeviceId(enum.IntEnum):
    """The numbers that identify virtio device types. Any other number may be used for a device of one's own."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    RNG = 4
    BALLOON = 5
    IO_MEMORY = 6
    RPMSG = 7
    SCSI = 8
    NINE_P = 9
    MAC80211_WLAN = 10
    RPROC_SERIAL = 11
    CAIF = 12
    MEMORY_BALLOON = 13
    GPU = 16
    RTC = 17
    INPUT = 18
    VSOCK = 19
    CRYPTO = 20
    SIGNAL_DISTRIBUTION = 21
    PSTORE = 22
    IOMMU = 23
    MEM = 24
    SOUND = 25
    FS = 26
    PMEM = 27
    RPMB = 28
    MAC80211_HWSIM = 29
    VIDEO_ENCODER = 30
    VIDEO_DECODER = 31
    SCMI = 32
    NITRO_SECURE_MODULE = 33
    I2C_ADAPTER = 34
    WATCHDOG = 35
    CAN = 36
    DMABUF = 37
    PARAMETER_SERVER = 38
    AUDIO_POLICY = 39
    BLUETOOTH = 40
    GPIO = 41
    RDMA = 42
    CAMERA = 43
    ISM = 44
    SPI = 45
    TEE = 46
    CPU_BALLOON = 47
    MEDIA = 48
    USB = 49
