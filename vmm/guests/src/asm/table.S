# The story guest: a table that is changed for ever and always checks out.
#
# 16384 entries of 32 bits at 2 MiB are filled from a generator. Each step does
# 2000 times: draw a number, swap the two entries it names, add to the first.
# A running checksum follows each change. Then the checksum of the whole table
# is taken afresh, and one line says whether everything agrees:
#
#     step 00000042 sum 1a2b3c4d ok
#
# The sum is a pure function of the step: src/table.rs is the model.
# The checksum is the sum over i of entry[i] * weight(i), mod 2^32, where
# weight(i) = (i * 0x9e3779b1) | 1, so that an exchanged or stale page shows.
#
# State that memory alone does not hold, so that a restore that loses it shows:
#   EBP                       the generator, from the first step to the last
#   XMM7                      the running checksum (a second copy is in memory)
#   ST0, FCW, MXCSR           the step, and settings that are not the default
#   MSR IA32_SYSENTER_ESP     the step
#   DR0                       the step
# What disagrees is named, and vCPU 0 stops:
#
#     step 00000042 sum 1a2b3c4d BAD table register sse fpu msr debug
#
# On a fast machine vCPU 0 waits, by the time-stamp counter, for 2^26 cycles
# since the last line. The difference is taken mod 2^32, so a counter that
# jumped over a restore delays by 2^26 cycles at most.
#
# Every other vCPU n counts in its own page at 3 MiB + n * 4096 (64 bits, then
# a word that becomes 1 if the count in memory and in ESI ever differ).
#
# Commands, one byte each, obeyed between two steps:
#   p   answers "pong"
#   c   answers "cpu N count XXXXXXXX" (low 32 bits; " BAD" after it if so)
#       for each other vCPU
#   q   ends the machine
# Anything else is answered by "got XX".

.include "common.inc"

.set ENTRIES, 16384
.set OPERATIONS, 2000
.set SEED, 0x2545f491
.set WEIGHT, 0x9e3779b1
.set CYCLES_PER_LINE, 1 << 26

.set STATE, 0x1f1000
.set STEP, STATE
.set SUM, STATE + 4             # running checksum, the copy in memory
.set GENERATOR, STATE + 8       # the generator as the last step left it
.set FAULTS, STATE + 12
.set LAST_TSC, STATE + 16
.set VCPUS, STATE + 20
.set FRESH_SUM, STATE + 24       # checksum of the whole table
.set XMM, STATE + 0x40          # the way in and out of XMM7
.set FPU, STATE + 0x200         # FXSAVE image, 512 bytes
.set FPU_CONTROL, FPU
.set FPU_STATUS, FPU + 2
.set FPU_TAGS, FPU + 4
.set FPU_MXCSR, FPU + 24
.set FPU_ST0, FPU + 32
.set TABLE, 0x200000
.set COUNTERS, 0x300000

.set FAULT_TABLE, 1
.set FAULT_REGISTER, 2
.set FAULT_SSE, 4
.set FAULT_FPU, 8
.set FAULT_MSR, 16
.set FAULT_DEBUG, 32

.set CONTROL, 0x027f            # 53-bit precision; the default is 0x037f
.set MXCSR, 0x5f80              # round up; the default is 0x1f80
.set IA32_SYSENTER_ESP, 0x175

    BEGIN "table"
    mov [VCPUS], ebx
    call enable_sse
    call fill
    mov dword ptr [STEP], 0
    mov dword ptr [FAULTS], 0
    call fpu_begin
    call mark_machine
    rdtsc
    mov [LAST_TSC], eax

next_step:
    call check_machine
    inc dword ptr [STEP]
    call mark_machine
    call operations
    call check_generator
    call check_table
    call check_machine
    call put_line
    cmp dword ptr [FAULTS], 0
    jne park
    call obey
    call pace
    jmp next_step

enable_sse:
    mov eax, cr0
    and eax, ~0xc               # EM, TS
    or eax, 2                   # MP
    mov cr0, eax
    mov eax, cr4
    or eax, 0x600               # OSFXSR, OSXMMEXCPT
    mov cr4, eax
    ret

# Fills the table and begins the checksum. From here on EBP is the generator.
fill:
    mov ebp, SEED
    xor esi, esi
    xor edi, edi                # index * WEIGHT
    xor ebx, ebx                # checksum
1:
    XORSHIFT ebp, eax
    mov [TABLE + esi * 4], ebp
    mov eax, edi
    or eax, 1
    imul eax, ebp
    add ebx, eax
    add edi, WEIGHT
    inc esi
    cmp esi, ENTRIES
    jb 1b
    mov [GENERATOR], ebp
    mov [SUM], ebx
    mov [XMM], ebx
    xor eax, eax
    mov [XMM + 4], eax
    mov [XMM + 8], eax
    mov [XMM + 12], eax
    movdqa xmm7, [XMM]
    ret

# One number in ST0, and settings that are not the default.
fpu_begin:
    fninit
    fxsave [FPU]
    mov word ptr [FPU_CONTROL], CONTROL
    mov word ptr [FPU_STATUS], 7 << 11          # top of stack is register 7
    mov byte ptr [FPU_TAGS], 1 << 7             # which is in use
    mov dword ptr [FPU_MXCSR], MXCSR
    mov dword ptr [FPU_ST0], 0
    mov dword ptr [FPU_ST0 + 4], 0x80000000     # a normal number
    mov dword ptr [FPU_ST0 + 8], 0x3fff
    fxrstor [FPU]
    ret

# Writes the step where only the saved state of a vCPU can keep it.
mark_machine:
    mov ebx, [STEP]
    fxsave [FPU]
    mov [FPU_ST0], ebx
    fxrstor [FPU]
    mov ecx, IA32_SYSENTER_ESP
    mov eax, ebx
    xor edx, edx
    wrmsr
    mov dr0, ebx
    ret

# Compares what mark_machine wrote.
check_machine:
    mov ebx, [STEP]
    fxsave [FPU]
    cmp [FPU_ST0], ebx
    jne 1f
    cmp dword ptr [FPU_ST0 + 4], 0x80000000
    jne 1f
    cmp word ptr [FPU_CONTROL], CONTROL
    jne 1f
    cmp dword ptr [FPU_MXCSR], MXCSR
    je 2f
1:
    or dword ptr [FAULTS], FAULT_FPU
2:
    movdqa [XMM], xmm7
    mov eax, [XMM]
    cmp eax, [SUM]
    je 3f
    or dword ptr [FAULTS], FAULT_SSE
3:
    mov ecx, IA32_SYSENTER_ESP
    rdmsr
    cmp eax, ebx
    je 4f
    or dword ptr [FAULTS], FAULT_MSR
4:
    mov eax, dr0
    cmp eax, ebx
    je 5f
    or dword ptr [FAULTS], FAULT_DEBUG
5:
    ret

# The changes of one step: with a = entry[i] and b = entry[j] the swap adds
# (b - a) * (weight(i) - weight(j)) to the checksum, and the number added to
# entry i, step + generator, its product with weight(i).
operations:
    mov ecx, OPERATIONS
1:
    XORSHIFT ebp, eax
    mov esi, ebp
    and esi, ENTRIES - 1                        # i
    mov edi, ebp
    shr edi, 14
    and edi, ENTRIES - 1                        # j
    mov eax, [TABLE + esi * 4]
    mov edx, [TABLE + edi * 4]
    mov [TABLE + esi * 4], edx
    mov [TABLE + edi * 4], eax
    sub edx, eax
    imul ebx, edi, WEIGHT
    or ebx, 1                                   # weight(j)
    imul edi, esi, WEIGHT
    or edi, 1                                   # weight(i)
    mov eax, edi
    sub eax, ebx
    imul edx, eax
    mov ebx, [STEP]
    add ebx, ebp
    add [TABLE + esi * 4], ebx
    imul ebx, edi
    add edx, ebx
    add [SUM], edx
    movdqa [XMM], xmm7
    add [XMM], edx
    movdqa xmm7, [XMM]
    dec ecx
    jnz 1b
    ret

# Draws the step's numbers again from the copy in memory: EBP must agree.
check_generator:
    mov ebx, [GENERATOR]
    mov ecx, OPERATIONS
1:
    XORSHIFT ebx, eax
    dec ecx
    jnz 1b
    cmp ebx, ebp
    je 2f
    or dword ptr [FAULTS], FAULT_REGISTER
2:
    mov [GENERATOR], ebp
    ret

# Takes the checksum of the whole table and compares it with the running one.
check_table:
    xor esi, esi
    xor edi, edi                                # index * WEIGHT
    xor ebx, ebx
1:
    mov eax, edi
    or eax, 1
    imul eax, [TABLE + esi * 4]
    add ebx, eax
    add edi, WEIGHT
    inc esi
    cmp esi, ENTRIES
    jb 1b
    mov [FRESH_SUM], ebx
    cmp ebx, [SUM]
    je 2f
    or dword ptr [FAULTS], FAULT_TABLE
2:
    ret

.macro PUT_FAULT bit, text
    test dword ptr [FAULTS], \bit
    jz 8201f
    PRINT " \text"
8201:
.endm

put_line:
    PRINT "step "
    mov eax, [STEP]
    call put_decimal_8
    PRINT " sum "
    mov eax, [FRESH_SUM]
    call put_hex
    cmp dword ptr [FAULTS], 0
    jne 1f
    PRINT " ok\n"
    ret
1:
    PRINT " BAD"
    PUT_FAULT FAULT_TABLE, "table"
    PUT_FAULT FAULT_REGISTER, "register"
    PUT_FAULT FAULT_SSE, "sse"
    PUT_FAULT FAULT_FPU, "fpu"
    PUT_FAULT FAULT_MSR, "msr"
    PUT_FAULT FAULT_DEBUG, "debug"
    PRINT "\n"
    ret

# Obeys every command that has arrived.
obey:
    call poll_char
    jnc 9f
    cmp al, 'p'
    je 1f
    cmp al, 'c'
    je 2f
    cmp al, 'q'
    je 3f
    call put_unknown
    jmp obey
1:
    PRINT "pong\n"
    jmp obey
2:
    call put_counters
    jmp obey
3:
    RESET
9:
    ret

put_counters:
    mov esi, 1
    mov edi, COUNTERS
1:
    cmp esi, [VCPUS]
    jae 3f
    add edi, 4096
    PRINT "cpu "
    mov eax, esi
    call put_decimal
    PRINT " count "
    mov eax, [edi]
    call put_hex
    cmp dword ptr [edi + 8], 0
    je 2f
    PRINT " BAD"
2:
    PRINT "\n"
    inc esi
    jmp 1b
3:
    ret

# Waits until CYCLES_PER_LINE have passed since the last line.
pace:
    rdtsc
    mov ebx, eax
    sub ebx, [LAST_TSC]
    cmp ebx, CYCLES_PER_LINE
    jae 1f
    pause
    jmp pace
1:
    mov [LAST_TSC], eax
    ret

# Every other vCPU: EAX is its index. No stack is needed.
secondary:
    shl eax, 12
    lea edi, [COUNTERS + eax]
    xor esi, esi
    mov [edi], esi
    mov [edi + 4], esi
    mov [edi + 8], esi
1:
    pause
    inc esi
    inc dword ptr [edi]
    jnz 2f
    inc dword ptr [edi + 4]
2:
    cmp esi, [edi]
    je 1b
    mov dword ptr [edi + 8], 1
    jmp park

    ROUTINES
