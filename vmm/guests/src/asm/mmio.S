# A hostile guest: addresses that no RAM backs, in every width.
#
# Reads, and writes garbage, of 1, 2, 4 and 8 bytes: scattered over 3 to 4 GiB,
# at every register of the pages where devices are likely to be, around the end
# of RAM, across pages, and in the interrupt controllers' pages, whose registers
# are spared only what would stop this vCPU (an INIT to itself, unmasked NMIs).
# Prints a line after each part, ends with "done" and a reset.

.include "common.inc"

.set HOLE, 0xc0000000
.set IOAPIC, 0xfec00000
.set LAPIC, 0xfee00000
.set STRIDE, 0x8003             # odd: every alignment comes up
.set BUFFER, 0x200000

# ACCESS address, in every width, reading before writing; EBP is garbage.
.macro ACCESS at
    mov al, [\at]
    mov ax, [\at]
    mov eax, [\at]
    movq mm0, [\at]
    mov eax, ebp
    mov [\at], al
    mov [\at], ax
    mov [\at], eax
    movq [\at], mm1
.endm

    BEGIN "mmio"
    mov ebp, 0x2545f491
    mov dword ptr [BUFFER], 0xdeadbeef
    mov dword ptr [BUFFER + 4], 0xfeedface
    movq mm1, [BUFFER]
    push ecx

    # Scattered, but for the interrupt controllers' pages.
    mov edi, HOLE
1:
    mov eax, edi
    and eax, 0xfffff000
    cmp eax, IOAPIC
    je 2f
    cmp eax, LAPIC
    je 2f
    cmp eax, LAPIC - 0x1000                     # its last bytes reach over
    je 2f
    XORSHIFT ebp, eax
    ACCESS edi
2:
    add edi, STRIDE
    cmp edi, HOLE
    jae 1b
    PRINT "scattered\n"

    # The first 64 registers of the first 8 pages of every 16 MiB.
    mov edi, HOLE
3:
    XORSHIFT ebp, eax
    mov eax, [edi]
    mov [edi], ebp
    add edi, 4
    test edi, 0xff
    jnz 3b
    add edi, 0x1000 - 0x100
    test edi, 0x7000
    jnz 3b
    add edi, 0x1000000 - 0x8000
    cmp edi, HOLE
    jae 3b
    PRINT "registers\n"

    # Around the end of RAM, and across a page without RAM.
    pop edi
    shl edi, 20
    sub edi, 9
    call around
    mov edi, 0xd0001000 - 9
    call around
    mov eax, [0xfffffffe]                       # ends at address 1
    PRINT "edges\n"

    # Instructions that read and write, the stack, and strings.
    mov edi, 0xd0000000
    lock xadd [edi], eax
    lock cmpxchg [edi], ebp
    lock or dword ptr [edi + 4], 1
    lock btc dword ptr [edi + 8], 3
    xchg [edi + 12], eax
    mov ebx, esp
    mov esp, 0xd0000100
    push ebp
    pop eax
    mov esp, ebx
    mov esi, 0xd0000ff0
    mov edi, BUFFER
    mov ecx, 16
    rep movsd
    mov esi, BUFFER
    mov edi, 0xd0000ff0
    mov ecx, 16
    rep movsd
    mov edi, 0xd0000ff8
    mov ecx, 64
    rep stosb
    PRINT "instructions\n"

    # The I/O APIC: select a register, write garbage with the mask bit set.
    xor ecx, ecx
4:
    XORSHIFT ebp, eax
    mov [IOAPIC], ecx
    mov eax, [IOAPIC + 0x10]
    mov al, [IOAPIC + 0x11]
    mov ax, [IOAPIC + 0x12]
    mov eax, ebp
    or eax, 0x10000
    mov [IOAPIC + 0x10], eax
    mov [IOAPIC + 0x20], eax
    inc ecx
    cmp ecx, 0x100
    jb 4b

    # The local APIC: the same, but for the register that sends (0x300).
    mov edi, LAPIC
5:
    XORSHIFT ebp, eax
    mov al, [edi + 1]
    mov ax, [edi + 2]
    mov eax, [edi]
    mov eax, [edi + 4]
    cmp edi, LAPIC + 0x300
    je 6f
    mov eax, ebp
    or eax, 0x10000
    mov [edi], eax
    mov [edi + 5], al
    mov [edi + 6], ax
6:
    add edi, 0x10
    cmp edi, LAPIC + 0x1000
    jb 5b
    PRINT "controllers\n"
    PRINT "done\n"
    RESET

# ACCESS to each of the 18 bytes from EDI on.
around:
    mov ecx, 18
7:
    XORSHIFT ebp, eax
    ACCESS edi
    inc edi
    dec ecx
    jnz 7b
    ret

secondary:
    jmp park

    ROUTINES
