# Waits for a character: `r` makes it ready, anything else resets the machine.

.include "common.inc"

.set READY, 0x620

    BEGIN "ready"
    PRINT "waiting\n"
    call get_char
    cmp al, 'r'
    jne reset
    mov edx, READY
    out dx, al
    PRINT "after\n"
    jmp park
reset:
    RESET

secondary:
    jmp park

    ROUTINES
