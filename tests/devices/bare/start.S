# Where the guest begins: by PVH in 32-bit mode without paging, or by Linux's 64-bit protocol. In 64-bit mode, with the
# first 4 GiB of addresses mapped to themselves, both go on in guest().

    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, 18              # the sizes of a name and of an address, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start_pvh

    .text
    .code32
start_pvh:
    cli
    mov $tables, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax              # PAE
    mov %eax, %cr4
    mov $0xc0000080, %ecx       # EFER
    rdmsr
    or $0x100, %eax             # LME
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax        # PG
    mov %eax, %cr0
    lgdt descriptors_at
    ljmp $8, $start_linux

    .code64
    .globl start_linux
start_linux:
    cli
    mov $tables, %eax
    mov %rax, %cr3
    lgdt descriptors_at
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack_end, %esp
    pushq $8
    pushq $1f
    lretq
1:  call guest
2:  hlt
    jmp 2b

    .data
    .align 8
descriptors:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
descriptors_at:
    .word . - descriptors - 1
    .quad descriptors
    .align 4096
    .globl tables
tables:
    .quad directory + 3
    .fill 511, 8, 0
directory:
    .quad pages + 3, pages + 0x1003, pages + 0x2003, pages + 0x3003
    .fill 508, 8, 0
pages:
    .set number, 0
    .rept 2048
    .quad number << 21 | 0x83   # 2 MiB, writable
    .set number, number + 1
    .endr

    .bss
    .align 16
    .skip 16384
stack_end:

    .section .note.GNU-stack, "", @progbits
