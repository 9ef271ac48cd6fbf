/* A guest without an operating system, for virtual machine monitors that give it 256 MiB. It uses few instructions, so
 * that it runs where KVM has to emulate each of them, too.
 *
 * Its disk (virtio-blk, on PCI or MMIO) gets blocks of 4096 bytes that it reads again and compares. Its source of
 * entropy (virtio-rng, on PCI) fills pages that nobody else writes to; at the end of each life of the guest they still
 * have to hold what was written there. After a life it resets the devices and begins anew.
 *
 * The last block of the disk has its orders: how many rounds a life has, how many lives there are, and whether there is
 * a source of entropy to be used. It looks there every sixteen rounds, and writes its life and round to the block
 * before.
 */

#include <stddef.h>
#include <stdint.h>

enum {
    SERIAL = 0x3f8, PCI_ADDRESS = 0xcf8, PCI_DATA = 0xcfc, KEYBOARD = 0x64, PIC_MASKS = 0x21,
    ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8,
    NEXT = 1, WRITE = 2, NO_NOTIFY = 1,
    BLK_DEVICE = 0x1042, RNG_DEVICE = 0x1044,
    READ = 0, WRITTEN = 1,
    VECTOR = 0x41,
    SIZE = 64,          /* of a ring, at most */
    BATCH = 16,         /* requests at once */
    BLOCK = 4096,
    BLOCKS = 200,       /* batches on the disk */
    PAGES = 1024,       /* for random numbers */
    STRIDE = 256,       /* of what is looked at, since it is slow where each instruction is emulated */
};

#define AT(type, address) (*(volatile type *)(address))
#define LOCAL_APIC 0xfee00000ul

static void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static void outw(uint16_t port, uint16_t value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static void outl(uint16_t port, uint32_t value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static void barrier(void) { __asm__ volatile("lock; addl $0, (%%rsp)" ::: "memory"); }

/* --- What is told ------------------------------------------------------------------------------------------------- */

static void say(const char *text)
{
    while (*text)
        outb(SERIAL, *text++);
}

static void say_number(const char *before, uint64_t number)
{
    char digits[24];
    int at = sizeof digits - 1;
    digits[at] = 0;
    do {
        digits[--at] = '0' + number % 10;
    } while (number /= 10);
    say(before);
    say(digits + at);
}

/* --- Memory and interrupts ---------------------------------------------------------------------------------------- */

extern uint64_t tables[];

/* Windows of devices may lie anywhere: the pages at `address` are mapped to themselves. */
static uint64_t map(uint64_t address)
{
    static uint64_t spare[8][512] __attribute__((aligned(4096)));
    static int used;
    uint64_t *table = tables, scratch;
    for (int shift = 39; shift >= 30; shift -= 9) {
        uint64_t *entry = &table[address >> shift & 511];
        if (!(*entry & 1))
            *entry = (uint64_t)spare[used++] | 3;
        table = (uint64_t *)(*entry & ~0xffful);
    }
    table[address >> 21 & 511] = (address & ~0x1ffffful) | 0x93; /* 2 MiB, not cached */
    __asm__ volatile("mov %%cr3, %0; mov %0, %%cr3" : "=r"(scratch)::"memory");
    return address;
}

static volatile uint64_t interrupts;

struct frame;
__attribute__((interrupt)) static void on_interrupt(struct frame *frame)
{
    (void)frame;
    interrupts++;
    AT(uint32_t, LOCAL_APIC + 0xb0) = 0;
}

static void take_interrupts(void)
{
    static struct {
        uint16_t low, selector, type, middle;
        uint32_t high, zero;
    } gates[256] __attribute__((aligned(16)));
    struct {
        uint16_t limit;
        uint64_t base;
    } __attribute__((packed)) at = {sizeof gates - 1, (uint64_t)gates};
    uint64_t handler = (uint64_t)on_interrupt;
    gates[VECTOR].low = handler;
    gates[VECTOR].selector = 8;
    gates[VECTOR].type = 0x8e00;
    gates[VECTOR].middle = handler >> 16;
    gates[VECTOR].high = handler >> 32;
    __asm__ volatile("lidt %0" ::"m"(at));
    outb(PIC_MASKS, 0xff);
    outb(PIC_MASKS + 0x80, 0xff);
    AT(uint32_t, LOCAL_APIC + 0xf0) = 0x1ff; /* on */
    AT(uint32_t, LOCAL_APIC + 0x80) = 0;
    __asm__ volatile("sti");
}

/* --- Devices ------------------------------------------------------------------------------------------------------ */

struct device {
    int is_mmio;
    uint64_t registers, config, notify_base, notify;
    uint32_t notify_multiplier;
    uint16_t size, seen;
    struct {
        uint64_t address;
        uint32_t length;
        uint16_t flags, next;
    } descriptors[SIZE] __attribute__((aligned(4096)));
    struct {
        uint16_t flags, index, ring[SIZE];
    } available __attribute__((aligned(4096)));
    struct {
        uint16_t flags, index;
        struct {
            uint32_t id, length;
        } ring[SIZE];
    } used __attribute__((aligned(4096)));
};

static struct device disk, entropy;

static uint32_t pci_read(uint32_t slot, uint32_t at)
{
    outl(PCI_ADDRESS, 0x80000000 | slot << 11 | at);
    return inl(PCI_DATA);
}

static uint64_t pci_window(uint32_t slot, uint32_t number)
{
    uint32_t low = pci_read(slot, 0x10 + 4 * number);
    uint64_t high = (low & 6) == 4 ? pci_read(slot, 0x14 + 4 * number) : 0;
    return high << 32 | (low & ~15u);
}

/* One message for all queues. A monitor may insist on 16 bits for its control word. */
static void use_msix(uint32_t slot, uint32_t capability)
{
    uint32_t control = pci_read(slot, capability) >> 16, where = pci_read(slot, capability + 4);
    uint64_t entry = map(pci_window(slot, where & 7) + (where & ~7u));
    outl(PCI_ADDRESS, 0x80000000 | slot << 11 | capability);
    outw(PCI_DATA + 2, control | 0x8000);
    AT(uint32_t, entry) = LOCAL_APIC;
    AT(uint32_t, entry + 4) = 0;
    AT(uint32_t, entry + 8) = VECTOR;
    AT(uint32_t, entry + 12) = 0;
}

static void use_pci(struct device *device, uint32_t slot)
{
    uint32_t command = pci_read(slot, 4) | 6; /* its memory, and its writes to ours */
    outl(PCI_DATA, command);
    for (uint32_t at = pci_read(slot, 0x34) & 0xfc; at; at = pci_read(slot, at) >> 8 & 0xfc) {
        uint32_t word = pci_read(slot, at);
        if ((word & 0xff) == 0x11)
            use_msix(slot, at);
        if ((word & 0xff) != 9)
            continue;
        uint32_t kind = word >> 24;
        if (kind != 1 && kind != 2 && kind != 4)
            continue;
        uint64_t address = map(pci_window(slot, pci_read(slot, at + 4) & 0xff) + pci_read(slot, at + 8));
        if (kind == 1)
            device->registers = address;
        if (kind == 4)
            device->config = address;
        if (kind == 2) {
            device->notify_base = address;
            device->notify_multiplier = pci_read(slot, at + 16);
        }
    }
}

static void find_devices(void)
{
    for (uint32_t slot = 0; slot < 32; slot++) {
        uint32_t id = pci_read(slot, 0);
        if (id == (BLK_DEVICE << 16 | 0x1af4))
            use_pci(&disk, slot);
        if (id == (RNG_DEVICE << 16 | 0x1af4)) /* a monitor may have one of its own: the last counts */
            use_pci(&entropy, slot);
    }
    /* Where Firecracker has them, whose other devices are not needed. */
    for (uint64_t at = 0xc0000000; !disk.registers && at < 0xc0020000; at += 0x1000)
        if (AT(uint32_t, at) == 0x74726976 && AT(uint32_t, at + 8) == 2) {
            disk.is_mmio = 1;
            disk.registers = at;
            disk.config = at + 0x100;
        }
}

static uint8_t status(struct device *device)
{
    return device->is_mmio ? AT(uint32_t, device->registers + 0x70) : AT(uint8_t, device->registers + 20);
}

static void set_status(struct device *device, uint8_t value)
{
    if (device->is_mmio)
        AT(uint32_t, device->registers + 0x70) = value;
    else
        AT(uint8_t, device->registers + 20) = value;
}

static void set_features(struct device *device, uint32_t word, uint32_t bits)
{
    AT(uint32_t, device->registers + (device->is_mmio ? 0x24 : 8)) = word;
    AT(uint32_t, device->registers + (device->is_mmio ? 0x20 : 12)) = bits;
}

static void set_address(struct device *device, uint32_t mmio, uint32_t pci, volatile void *address)
{
    uint64_t at = device->registers + (device->is_mmio ? mmio : pci);
    AT(uint32_t, at) = (uint64_t)address;
    AT(uint32_t, at + 4) = (uint64_t)address >> 32;
}

static uint16_t at_most(uint16_t size, uint32_t offered) { return size < offered ? size : offered; }

/* Reset it, and start its first queue. */
static int begin(struct device *device)
{
    uint64_t registers = device->registers;
    set_status(device, 0);
    while (status(device))
        ;
    device->seen = 0;
    AT(uint32_t, &device->available) = 0;
    AT(uint32_t, &device->used) = 0;
    set_status(device, ACKNOWLEDGE);
    set_status(device, ACKNOWLEDGE | DRIVER);
    set_features(device, 0, 0);
    set_features(device, 1, 1); /* VERSION_1 */
    set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(status(device) & FEATURES_OK)) {
        say("features were refused");
        return 0;
    }
    if (device->is_mmio) {
        AT(uint32_t, registers + 0x30) = 0;
        device->size = at_most(SIZE, AT(uint32_t, registers + 0x34));
        AT(uint32_t, registers + 0x38) = device->size;
    } else {
        AT(uint16_t, registers + 22) = 0;
        device->size = at_most(SIZE, AT(uint16_t, registers + 24));
        AT(uint16_t, registers + 24) = device->size;
        AT(uint16_t, registers + 26) = 0; /* the first message */
    }
    set_address(device, 0x80, 32, device->descriptors);
    set_address(device, 0x90, 40, &device->available);
    set_address(device, 0xa0, 48, &device->used);
    if (device->is_mmio) {
        device->notify = registers + 0x50;
        AT(uint32_t, registers + 0x44) = 1;
    } else {
        device->notify = device->notify_base + AT(uint16_t, registers + 30) * device->notify_multiplier;
        AT(uint16_t, registers + 28) = 1;
    }
    set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return 1;
}

static void describe(struct device *device, int number, volatile void *buffer, uint32_t length, uint16_t flags)
{
    device->descriptors[number].address = (uint64_t)buffer;
    device->descriptors[number].length = length;
    device->descriptors[number].flags = flags;
    device->descriptors[number].next = number + 1;
}

/* Make `count` requests available, whose first descriptors are `stride` apart, and wait for all of them. */
static void perform(struct device *device, int count, int stride)
{
    uint16_t index = device->available.index;
    for (int i = 0; i < count; i++)
        device->available.ring[(uint16_t)(index + i) % device->size] = stride * i;
    barrier();
    AT(uint16_t, &device->available.index) = index + count;
    barrier();
    if (!(AT(uint16_t, &device->used.flags) & NO_NOTIFY)) {
        if (device->is_mmio)
            AT(uint32_t, device->notify) = 0;
        else
            AT(uint16_t, device->notify) = 0;
    }
    device->seen += count;
    while (AT(uint16_t, &device->used.index) != device->seen)
        __asm__ volatile("pause");
    barrier();
}

/* --- What is done with them --------------------------------------------------------------------------------------- */

static uint8_t blocks[BATCH][BLOCK] __attribute__((aligned(4096)));
static uint64_t numbers[PAGES][BLOCK / 8] __attribute__((aligned(4096)));
static uint64_t pages_filled;

/* Read or write `count` blocks from `first` on. */
static int transfer(uint32_t kind, uint64_t first, int count)
{
    static struct {
        uint32_t kind, reserved;
        uint64_t sector;
    } headers[BATCH];
    static volatile uint8_t results[BATCH];
    for (int i = 0; i < count; i++) {
        headers[i].kind = kind;
        headers[i].sector = (first + i) * (BLOCK / 512);
        results[i] = 0xff;
        describe(&disk, 3 * i, &headers[i], sizeof headers[i], NEXT);
        describe(&disk, 3 * i + 1, blocks[i], BLOCK, kind == READ ? NEXT | WRITE : NEXT);
        describe(&disk, 3 * i + 2, &results[i], 1, WRITE);
    }
    perform(&disk, count, 3);
    for (int i = 0; i < count; i++)
        if (results[i]) {
            say_number("wrong status ", results[i]);
            return 0;
        }
    return 1;
}

static uint64_t *word(int block, int at) { return (uint64_t *)&blocks[block][at]; }

static int write_and_compare(uint64_t life, uint64_t round)
{
    int count = 1 + round % BATCH;
    uint64_t first = round % BLOCKS * BATCH, mark = life << 48 | round << 16;
    for (int i = 0; i < count; i++)
        for (int at = 0; at < BLOCK; at += STRIDE)
            *word(i, at) = mark + i + at;
    if (!transfer(WRITTEN, first, count))
        return 0;
    for (int i = 0; i < count; i++)
        for (int at = 0; at < BLOCK; at += STRIDE)
            *word(i, at) = 0;
    if (!transfer(READ, first, count))
        return 0;
    for (int i = 0; i < count; i++)
        for (int at = 0; at < BLOCK; at += STRIDE)
            if (*word(i, at) != mark + i + at) {
                say_number("wrong data in block ", first + i);
                return 0;
            }
    return 1;
}

static void fill_pages(void)
{
    int count = at_most(BATCH, entropy.size);
    for (int i = 0; i < count; i++)
        describe(&entropy, i, numbers[pages_filled++ % PAGES], BLOCK, WRITE);
    perform(&entropy, count, 1);
}

/* Each page has numbers that follow each other, and were given after those of the page before it. */
static int pages_are_intact(void)
{
    uint64_t before = 0, count = pages_filled < PAGES ? pages_filled : PAGES;
    for (uint64_t i = pages_filled - count; i < pages_filled; i++) {
        uint64_t *page = numbers[i % PAGES];
        if (page[0] <= before) {
            say_number("an old page ", i);
            return 0;
        }
        for (int at = STRIDE / 8 - 1; at < BLOCK / 8; at += STRIDE / 8)
            if (page[at] != page[0] + at) {
                say_number("a torn page ", i);
                return 0;
            }
        before = page[BLOCK / 8 - 1];
    }
    return 1;
}

static struct {
    uint64_t rounds, lives, entropy;
} orders;

static int take_orders(uint64_t life, uint64_t round)
{
    uint64_t last = AT(uint32_t, disk.config) / (BLOCK / 512) - 1;
    if (!transfer(READ, last, 1))
        return 0;
    orders.rounds = *word(0, 0);
    orders.lives = *word(0, 8);
    orders.entropy = *word(0, 16);
    *word(0, 0) = life;
    *word(0, 8) = round;
    return transfer(WRITTEN, last - 1, 1);
}

static int live(void)
{
    uint64_t life = 0;
    do {
        if (!begin(&disk) || !take_orders(life, 0) || (orders.entropy && !begin(&entropy)))
            return 0;
        for (uint64_t round = 0; round < orders.rounds; round++) {
            if (round % 16 == 15 && !take_orders(life, round))
                return 0;
            if (!write_and_compare(life, round))
                return 0;
            if (orders.entropy)
                fill_pages();
        }
        if (!pages_are_intact())
            return 0;
        say_number("interrupts: ", interrupts);
        say("\n");
    } while (++life < orders.lives);
    return 1;
}

/* What nobody has touched, a monitor need not send when the guest migrates: so that it takes a while. */
static void touch_memory(void)
{
    for (uint64_t at = 32 << 20; at < 240 << 20; at += 4096)
        AT(uint64_t, at) = at;
}

void guest(void)
{
    touch_memory();
    find_devices();
    if (!disk.registers)
        say("there is no disk");
    else {
        if (!disk.is_mmio)
            take_interrupts();
        if (live())
            say("all is well");
    }
    say("\n");
    outb(KEYBOARD, 0xfe); /* reset */
}
