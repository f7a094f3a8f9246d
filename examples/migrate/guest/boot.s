# From reset to ring 3 in long mode.
#
# vCPU 0 starts at the PVH entry: 32-bit protected mode, flat segments, paging off, ebx the address of
# the start info. The others start in real mode at a copy of `trampoline`, where vCPU 0 sends them by
# INIT and SIPI. All load the same tables and leave for ring 3 at once, because ring 0 may be emulated
# and slow. IOPL 3 lets them use ports there. Nobody ever comes back: interrupts are off and there are
# no system calls. Accessed and dirty bits are set everywhere from the start, so nothing here changes later.

.set KERNEL_CODE_64, 0x08
.set KERNEL_DATA, 0x10
.set KERNEL_CODE_32, 0x18
.set USER_CODE_64, 0x20 + 3
.set USER_DATA, 0x28 + 3
.set IOPL_3, 0x3002
.set CR0_PG_MP_PE, 0x80000003
.set CR0_TS_EM, 0xc
.set CR4_SSE_PAE, 0x620
.set EFER, 0xc0000080
.set EFER_LME, 0x100
.set TABLE, 0x27                    # present, writable, user, accessed
.set LARGE_PAGE, 0xe7               # and dirty, 2 MiB

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18                  # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long protected_start

.section .boot, "ax"
.globl protected_start, trampoline, trampoline_end
.code16
trampoline:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl gdt_pointer_copy - trampoline
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $KERNEL_CODE_32, $other_start
gdt_pointer_copy:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

.code32
protected_start:
    cli
    lgdt gdt_pointer
    mov %ebx, %edi                  # first argument of guest_main: the start info
    xor %esi, %esi                  # second argument: the number of this vCPU
    jmp to_long_mode

other_start:
    mov $KERNEL_DATA, %eax
    mov %eax, %ds
    xor %edi, %edi
    mov $1, %esi
    lock xadd %esi, others_arrived
    inc %esi
    cmp others_wanted, %esi
    jbe to_long_mode
    hlt                             # more vCPUs than the command line says, interrupts are off

to_long_mode:
    mov %cr4, %eax
    or $CR4_SSE_PAE, %eax
    mov %eax, %cr4
    mov $page_map, %eax
    mov %eax, %cr3
    mov $EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
    mov %cr0, %eax
    and $~CR0_TS_EM, %eax
    or $CR0_PG_MP_PE, %eax
    mov %eax, %cr0
    ljmp $KERNEL_CODE_64, $in_long_mode

.code64
in_long_mode:
    lea 1(%rsi), %rax
    imul ${block_bytes}, %rax
    lea image_end(%rax), %rsp       # blocks follow the image; the stack starts at the end of one
    lea -8(%rsp), %rax              # aligned as if guest_main had been called
    mov $USER_DATA, %ecx
    mov %ecx, %ds
    mov %ecx, %es
    push %rcx
    push %rax
    push $IOPL_3
    push $USER_CODE_64
    push $guest_main
    iretq

.section .data
.balign 4096
page_map:
    .quad gib_map + TABLE
    .fill 511, 8, 0
.globl gib_map, others_arrived, others_wanted
gib_map:
    .quad first_gib + TABLE
    .fill 511, 8, 0
first_gib:
    .set address, 0
    .rept 512
    .quad address + LARGE_PAGE
    .set address, address + 0x200000
    .endr

gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # KERNEL_CODE_64
    .quad 0x00cf93000000ffff        # KERNEL_DATA
    .quad 0x00cf9b000000ffff        # KERNEL_CODE_32
    .quad 0x00affb000000ffff        # USER_CODE_64
    .quad 0x00cff3000000ffff        # USER_DATA
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

.balign 4
others_arrived:
    .long 0
others_wanted:
    .long 0
