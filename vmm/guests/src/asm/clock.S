# Tells the time of kvmclock, in nanoseconds: at the character `t` a line
# `t <16 hexadecimal digits>`; anything else resets the machine.

.include "common.inc"

.set SYSTEM_TIME_MSR, 0x4b564d01
# struct pvclock_vcpu_time_info
.set TIME, 0x200000
.set VERSION, TIME
.set TSC_TIMESTAMP, TIME + 8
.set SYSTEM_TIME, TIME + 16
.set MULTIPLIER, TIME + 24
.set SHIFT, TIME + 28

    BEGIN "clock"
    mov ecx, SYSTEM_TIME_MSR
    mov eax, TIME + 1
    xor edx, edx
    wrmsr
    PRINT "waiting\n"
next:
    call get_char
    cmp al, 't'
    jne reset
read:
    mov ebx, [VERSION]
    test ebx, 1
    jnz read
    rdtsc
    sub eax, [TSC_TIMESTAMP]
    sbb edx, [TSC_TIMESTAMP + 4]
    movsx ecx, byte ptr [SHIFT]
    test ecx, ecx
    js right
    shld edx, eax, cl
    shl eax, cl
    jmp scale
right:
    neg ecx
    shrd eax, edx, cl
    shr edx, cl
scale:
    # EDX:EAX times the multiplier, divided by 2 to the 32.
    mov edi, edx
    mul dword ptr [MULTIPLIER]
    mov esi, edx
    mov eax, edi
    mul dword ptr [MULTIPLIER]
    add eax, esi
    adc edx, 0
    add eax, [SYSTEM_TIME]
    adc edx, [SYSTEM_TIME + 4]
    cmp ebx, [VERSION]
    jne read
    mov edi, eax
    PRINT "t "
    mov eax, edx
    call put_hex
    mov eax, edi
    call put_hex
    PRINT "\n"
    jmp next
reset:
    RESET

secondary:
    jmp park

    ROUTINES
