# Writes all over its memory for ever, and checks that nothing of it is stale.
#
# One word in each page from 4 MiB to the end of RAM (at most 2 GiB of it) is
# filled from a generator. Each pass adds a number to 20000 words, drawn from all
# pages or from the first 64, while a running checksum in a register follows.
# Then the checksum of all words is taken afresh:
#
#     churn 00000042 sum 1a2b3c4d ok
#
# or BAD in the place of ok, after which the guest stops. The checksum is the sum
# over pages i of word[i] * weight(i), mod 2^32, where weight(i) = (i * 0x9e3779b1)
# | 1, so that one page that is not of the same instant as the others shows.
#
# Commands, one byte each, obeyed between two passes:
#   c   calm: only the first 64 pages are written; answers "calm"
#   a   all of them again; answers "all"
#   q   ends the machine

.include "common.inc"

.set ADDITIONS, 20000
.set CALM_PAGES, 64
.set SEED, 0x2545f491
.set WEIGHT, 0x9e3779b1
.set WORDS, 0x400000

.set STATE, 0x1f1000
.set PAGES, STATE
.set WINDOW, STATE + 4
.set PASS, STATE + 8
.set FRESH, STATE + 12

    BEGIN "churn"
    cmp ecx, 2048
    jbe 1f
    mov ecx, 2048
1:
    sub ecx, 4
    shl ecx, 8
    mov [PAGES], ecx
    mov [WINDOW], ecx
    mov dword ptr [PASS], 0
    mov ebp, SEED
    call fill

next_pass:
    inc dword ptr [PASS]
    call additions
    call fresh_sum
    PRINT "churn "
    mov eax, [PASS]
    call put_decimal_8
    PRINT " sum "
    mov eax, [FRESH]
    call put_hex
    cmp eax, edi
    jne 1f
    PRINT " ok\n"
    call obey
    jmp next_pass
1:
    PRINT " BAD\n"
    jmp park

# ESI = page: EBX = the address of its word, EAX = its weight.
.macro WORD
    mov ebx, esi
    shl ebx, 6
    and ebx, 0xfc0
    mov eax, esi
    shl eax, 12
    lea ebx, [WORDS + eax + ebx]
    imul eax, esi, WEIGHT
    or eax, 1
.endm

# From here on EBP is the generator and EDI the running checksum.
fill:
    xor esi, esi
    xor edi, edi
1:
    XORSHIFT ebp, eax
    WORD
    mov [ebx], ebp
    imul eax, ebp
    add edi, eax
    inc esi
    cmp esi, [PAGES]
    jb 1b
    ret

additions:
    mov ecx, ADDITIONS
1:
    XORSHIFT ebp, eax
    mov eax, ebp
    shr eax, 4
    xor edx, edx
    div dword ptr [WINDOW]
    mov esi, edx
    WORD
    add [ebx], ebp
    imul eax, ebp
    add edi, eax
    dec ecx
    jnz 1b
    ret

fresh_sum:
    xor esi, esi
    xor edx, edx
1:
    WORD
    imul eax, [ebx]
    add edx, eax
    inc esi
    cmp esi, [PAGES]
    jb 1b
    mov [FRESH], edx
    ret

obey:
    call poll_char
    jnc 9f
    cmp al, 'c'
    je 1f
    cmp al, 'a'
    je 2f
    cmp al, 'q'
    je 3f
    call put_unknown
    jmp obey
1:
    mov dword ptr [WINDOW], CALM_PAGES
    PRINT "calm\n"
    jmp obey
2:
    mov eax, [PAGES]
    mov [WINDOW], eax
    PRINT "all\n"
    jmp obey
3:
    RESET
9:
    ret

secondary:
    jmp park

    ROUTINES
