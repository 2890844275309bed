# Halts for good: interrupts off, nothing to wake it.

.include "common.inc"

    BEGIN "halt"
    PRINT "halting\n"
    jmp park

secondary:
    jmp park

    ROUTINES
