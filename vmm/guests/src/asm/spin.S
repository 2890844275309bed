# Runs for ever and never exits by itself: only a signal gets it out of KVM_RUN.

.include "common.inc"

    BEGIN "spin"
    PRINT "spinning\n"
spin:
    jmp spin

secondary:
    jmp spin

    ROUTINES
