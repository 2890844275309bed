# A hostile guest: every port, in every width, then string I/O.
#
# Each of the 65536 ports is read and is sent a zero as byte, word and
# doubleword (zero never asks for a reset); the serial port prints some of these
# as NUL bytes. "every port". Then string I/O, forwards and backwards, on ports
# that devices use; "every string". Ends with "done" and a reset.

.include "common.inc"

.set BUFFER, 0x200000           # 64 KiB, the middle is where strings begin
.set MIDDLE, BUFFER + 0x8000
.set REPEATS, 300

    BEGIN "ports"
    xor edx, edx
1:
    in al, dx
    in ax, dx
    in eax, dx
    xor eax, eax
    out dx, al
    out dx, ax
    out dx, eax
    inc edx
    cmp edx, 0x10000
    jb 1b
    PRINT "every port\n"

    mov ebp, offset string_ports
2:
    movzx edx, word ptr [ebp]
    cld
    call strings
    std
    call strings
    cld
    add ebp, 2
    cmp ebp, offset string_ports_end
    jb 2b

    mov edx, SERIAL
    mov edi, BUFFER
    mov ecx, REPEATS
    rep insb
    mov esi, offset text
    mov ecx, offset text_bytes
    rep outsb
    PRINT "done\n"
    RESET

# All six string instructions on port DX, and a repetition of none. What goes
# out is zeros; what comes in is kept apart from it.
strings:
    mov edi, MIDDLE + 0x10000
    mov ecx, REPEATS
    rep insb
    mov ecx, REPEATS
    rep insw
    mov ecx, REPEATS
    rep insd
    mov esi, MIDDLE
    mov ecx, REPEATS
    rep outsb
    mov ecx, REPEATS
    rep outsw
    mov ecx, REPEATS
    rep outsd
    xor ecx, ecx
    rep outsb
    rep insd
    ret

# Interrupt controller, timer, keyboard, clock, diagnostics, PCI, serial (but for
# its data, which would flood the output), and the last port of all.
string_ports:
    .word 0x20, 0x40, 0x43, 0x60, 0x64, 0x70, 0x71, 0x80, 0xcf8, 0xcfc
    .word 0x3f9, 0x3fb, 0x3fd, 0x3ff, 0xffff
string_ports_end:
text:
    .ascii "every string\n"
.set text_bytes, . - text

secondary:
    jmp park

    ROUTINES
