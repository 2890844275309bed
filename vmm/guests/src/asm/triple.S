# Ends by a triple fault: an invalid instruction and an empty IDT.

.include "common.inc"

    BEGIN "triple"
    push 0
    push 0
    lidt [esp]
    ud2

secondary:
    jmp park

    ROUTINES
