# Ring-0 stub of the built-in guest: the entry points (64-bit Linux and PVH), the start of the other
# CPUs, and the fault handlers. It does as little as it can, because on a software KVM every
# instruction at CPL 0 is emulated; the workload itself is Rust code in ring 3 (main.rs).
#
# Everything that can be a constant is one: the GDT with a TSS for each CPU, the IDT and the page
# tables that cover the first GiB are part of the image, so no code has to build them.

.set BOOT_BASE,        0x100000   # where guest.ld puts this section
.set TRAMPOLINE,       0x8000     # real-mode start of the other CPUs, SIPI vector 8
.set STACKS,           0x300000   # one slot of STACK_BYTES for each CPU (control.rs)
.set STACK_BYTES,      0x4000
.set FAULT_STACK_BYTES,0x1000     # the lowest part of a slot is the ring-0 stack for faults
.set CPUS_MAX,         64
.set TSS_BYTES,        256
.set IO_BITMAP_BYTES,  128        # ports 0 to 0x3ff, all allowed
.set LAPIC,            0xfee00000

.set CODE32, 0x08
.set CODE64, 0x10
.set DATA,   0x18
.set USER_DATA, 0x2b
.set USER_CODE, 0x33
.set FIRST_TSS, 0x40

# Goes from 32-bit protected mode to long mode with the guest's own page tables, at TARGET.
.macro LONG_MODE target:vararg
    mov $0x20, %eax                      # PAE
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx                # EFER: LME, SCE
    xor %edx, %edx
    mov $0x101, %eax
    wrmsr
    mov $0x80000011, %eax
    mov %eax, %cr0
    ljmpl $CODE64, \target
.endm

.section .boot, "awx", @progbits
BOOT_BASE_LABEL:

# Linux 64-bit boot protocol: long mode, low memory identity-mapped, rsi = boot_params, interrupts off.
.global guest_entry
.code64
guest_entry:
    cli
    lgdt gdt_pointer(%rip)
    mov $trampoline, %rax
    mov $TRAMPOLINE, %edi
    mov %rsi, %rdx
    mov %rax, %rsi
    mov $(trampoline_end - trampoline + 7) / 8, %ecx
    mov $pml4, %rax
    mov %rax, %cr3
    cld
    rep movsq
    mov %rdx, %rsi

    # Wake all other CPUs at once: INIT, then SIPI twice, which all hardware accepts. How many there
    # should be is on the command line, which is read in ring 3; this code need not know.
    mov $LAPIC, %ebx
    movl $0x1ff, 0xf0(%rbx)              # software-enable
    movl $0xc4500, 0x300(%rbx)           # INIT, all but self
    movl $(0xc4600 | TRAMPOLINE >> 12), 0x300(%rbx)
    movl $(0xc4600 | TRAMPOLINE >> 12), 0x300(%rbx)

# Every CPU gets here, in long mode with the guest's own page tables; rsi is boot_params on the boot
# CPU and 0 on the others.
enter_long_mode:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    lidt idt_pointer(%rip)
    mov $LAPIC + 0x20, %eax              # local APIC id = index of this CPU
    mov (%rax), %edi
    shr $24, %edi
    cmp $CPUS_MAX, %edi
    jae park

    mov $0x620, %eax                     # PAE, OSFXSR, OSXMMEXCPT: ring 3 uses SSE
    mov %rax, %cr4
    mov $0x80010033, %eax                # PG, WP, NE, ET, MP, PE
    mov %rax, %cr0

    mov %edi, %eax
    shl $4, %eax
    add $FIRST_TSS, %eax
    ltr %ax

    # From here on each CPU has a stack of its own: the others get here at the same time, all with the
    # same stack.
    mov %edi, %eax
    imul $STACK_BYTES, %eax, %eax
    lea STACKS + FAULT_STACK_BYTES(%rax), %esp
    add $STACKS + STACK_BYTES - 8, %eax  # as after a call: 8 below 16-byte alignment
    mov $USER_DATA, %edx
    mov %edx, %ds
    mov %edx, %es
    push $USER_DATA
    push %rax
    push $2                              # rflags: interrupts stay off
    push $USER_CODE
    push $guest_main
    iretq
park:
    hlt
    jmp park

# The other entry point, which QEMU and others use (Xen's x86/HVM direct boot ABI, "PVH"): 32-bit
# protected mode, flat segments, no paging, ebx = hvm_start_info, which is converted to boot_params.
.set START_INFO_CMDLINE, 24
.set START_INFO_MEMMAP, 40
.set START_INFO_MEMMAP_ENTRIES, 48
.set BOOT_PARAMS_E820_COUNT, 0x1e8
.set BOOT_PARAMS_CMDLINE, 0x228
.set BOOT_PARAMS_E820, 0x2d0
.set E820_ENTRIES_MAX, 128
.code32
pvh_entry:
    cld
    lgdtl gdt_pointer
    mov $pvh_boot_params, %edi
    mov START_INFO_CMDLINE(%ebx), %eax
    mov %eax, BOOT_PARAMS_CMDLINE(%edi)
    mov START_INFO_MEMMAP_ENTRIES(%ebx), %edx
    cmp $E820_ENTRIES_MAX, %edx
    jbe 1f
    mov $E820_ENTRIES_MAX, %edx
1:  mov %dl, BOOT_PARAMS_E820_COUNT(%edi)
    mov START_INFO_MEMMAP(%ebx), %esi
    add $BOOT_PARAMS_E820, %edi
2:  test %edx, %edx
    jz 3f
    mov $5, %ecx                         # address, length and type, as in an E820 entry
    rep movsl
    add $4, %esi                         # skip the rest of the entry, which E820 lacks
    dec %edx
    jmp 2b
3:  LONG_MODE $pvh64
.code64
pvh64:
    mov $pvh_boot_params, %esi
    jmp guest_entry

# Copied to TRAMPOLINE. A CPU arrives in real mode with cs = TRAMPOLINE >> 4 and leaves in long mode.
.code16
trampoline:
    cli
    lgdtl %cs:(trampoline_gdt_pointer - trampoline)
    mov $0x11, %eax
    mov %eax, %cr0
    ljmpl $CODE32, $(TRAMPOLINE + trampoline32 - trampoline)
.code32
trampoline32:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %ss
    LONG_MODE $(TRAMPOLINE + trampoline64 - trampoline)
.code64
trampoline64:
    xor %esi, %esi
    mov $enter_long_mode, %eax
    mov $TRAMPOLINE + 0x1000, %esp
    jmp *%rax
.balign 8
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
.balign 8
trampoline_end:

# Faults: none is expected, so print which one it was on the serial port, and reset.
.macro FAULT_ENTRY vector
.balign 16
fault_\vector:
    .ifeq (\vector == 8 || (\vector >= 10 && \vector <= 14) || \vector == 17)
    push $0
    .endif
    push $\vector
    jmp fault
.endm
.altmacro
.set vector, 0
.rept 32
    FAULT_ENTRY %vector
    .set vector, vector + 1
.endr
.noaltmacro

fault:                                   # stack: vector, error code, rip, cs, ...
    lea fault_text_vector(%rip), %rsi
    call fault_print
    pop %rbx
    call fault_print_hex
    lea fault_text_error(%rip), %rsi
    call fault_print
    pop %rbx
    call fault_print_hex
    lea fault_text_rip(%rip), %rsi
    call fault_print
    pop %rbx
    call fault_print_hex
    lea fault_text_cr2(%rip), %rsi
    call fault_print
    mov %cr2, %rbx
    call fault_print_hex
    lea fault_text_end(%rip), %rsi
    call fault_print
    mov $0xfe, %eax                      # keyboard controller: reset the machine
    out %al, $0x64
    jmp park

fault_print:                             # rsi = text that ends with a zero byte
    mov $0x3f8, %edx
1:  movzbl (%rsi), %eax
    test %eax, %eax
    jz 2f
    out %al, %dx
    inc %rsi
    jmp 1b
2:  ret

fault_print_hex:                         # rbx = number
    mov $0x3f8, %edx
    mov $16, %ecx
1:  rol $4, %rbx
    mov %ebx, %eax
    and $15, %eax
    add $'0', %eax
    cmp $'9', %eax
    jbe 2f
    add $'a' - '0' - 10, %eax
2:  out %al, %dx
    dec %ecx
    jnz 1b
    ret

fault_text_vector: .asciz "\nfrazil-guest: fault vector="
fault_text_error:  .asciz " err="
fault_text_rip:    .asciz " rip="
fault_text_cr2:    .asciz " cr2="
fault_text_end:    .asciz "\n"

.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff             # 0x08 code, 32 bits
    .quad 0x00af9b000000ffff             # 0x10 code, 64 bits
    .quad 0x00cf93000000ffff             # 0x18 data
    .quad 0x00cffb000000ffff             # 0x23 user code, 32 bits
    .quad 0x00cff3000000ffff             # 0x2b user data
    .quad 0x00affb000000ffff             # 0x33 user code, 64 bits
    .quad 0
.set cpu, 0
.rept CPUS_MAX                           # 0x40 on: a 64-bit TSS for each CPU
    .word TSS_BYTES - 1
    .word tasks - BOOT_BASE_LABEL + cpu * TSS_BYTES
    .byte BOOT_BASE >> 16, 0x89, 0, 0
    .quad 0
    .set cpu, cpu + 1
.endr
gdt_end:

.balign 16
idt:
.set vector, 0
.rept 32
    .word fault_0 - BOOT_BASE_LABEL + vector * 16
    .word CODE64
    .word 0x8e00
    .word BOOT_BASE >> 16
    .quad 0
    .set vector, vector + 1
.endr
idt_end:

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt

# The I/O bitmap of a TSS opens the ports to ring 3; IOPL alone is not honoured everywhere.
.balign 256
tasks:
.set cpu, 0
.rept CPUS_MAX
    .long 0
    .quad STACKS + cpu * STACK_BYTES + FAULT_STACK_BYTES  # rsp0
    .zero 90
    .word 104                            # offset of the I/O bitmap
    .zero IO_BITMAP_BYTES
    .fill TSS_BYTES - 104 - IO_BITMAP_BYTES, 1, 0xff
    .set cpu, cpu + 1
.endr

# Page tables: the first GiB for ring 3, and the local APIC for ring 0. memory.rs adds the rest of
# the RAM.
.global page_directory_pointers
.global page_directory_gib3
.balign 4096
pml4:
    .quad page_directory_pointers + 7
    .zero 4088
page_directory_pointers:
    .quad page_directory_gib0 + 7
    .quad 0, 0
    .quad page_directory_gib3 + 7
    .zero 4064
page_directory_gib0:
.set page, 0
.rept 512
    .quad (page << 21) + 0xe7            # present, writable, user, accessed, dirty, 2 MiB
    .set page, page + 1
.endr
page_directory_gib3:
    .zero 503 * 8
    .quad LAPIC + 0xfb                   # present, writable, supervisor, uncached, 2 MiB
    .zero 8 * 8

.section .bss.pvh, "aw", @nobits
.balign 8
pvh_boot_params:
    .zero 4096

# Where PVH enters: the note XEN_ELFNOTE_PHYS32_ENTRY (18), all of it aligned to 4 bytes.
.section .note.pvh, "a", @note
    .balign 4
    .long 4
    .long 8
    .long 18
    .asciz "Xen"
    .quad pvh_entry
