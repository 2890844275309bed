# The bench guest: touches the memory it is told to touch.
#
# Prints "ready" and then obeys commands: one letter, then 32-bit numbers, least
# significant byte first. A page is 4096 bytes; page P begins at P * 4096. Pages
# may lie anywhere below 3 GiB; pages 256 to 511 hold this guest itself.
#
#   w count first value    stores value + P in the first word of each page P
#                          from first on; answers "w<count>" (decimal)
#   r count first          adds the first words of these pages, mod 2^32;
#                          answers "r<sum>" (eight hexadecimal digits)
#   s count first stride mask   adds the first words of as many pages of which the i-th
#                          is first + (i * stride & mask); answers "s<sum>"
#   b count first rounds   fills each page whole with the number of the round,
#                          from 0, in as many rounds; answers "b"
#   h                      halts with interrupts off, for good
#   q                      ends the machine
# Anything else is answered by "got XX".

.include "common.inc"

    BEGIN "touch"
    PRINT "ready\n"

next_command:
    call get_char
    cmp al, 'w'
    je write
    cmp al, 'r'
    je read
    cmp al, 's'
    je scattered
    cmp al, 'b'
    je fill
    cmp al, 'h'
    je park
    cmp al, 'q'
    je quit
    call put_unknown
    jmp next_command

# Count in ECX, first in EBX, and EDI the address of the first page.
get_pages:
    call get_u32
    mov ecx, eax
    call get_u32
    mov ebx, eax
    mov edi, eax
    shl edi, 12
    ret

write:
    call get_pages
    call get_u32
    add ebx, eax
    mov eax, ecx
    test ecx, ecx
    jz 2f
1:
    mov [edi], ebx
    inc ebx
    add edi, 4096
    dec ecx
    jnz 1b
2:
    PRINT "w"
    call put_decimal
    jmp end_of_answer

read:
    call get_pages
    xor eax, eax
    test ecx, ecx
    jz 2f
1:
    add eax, [edi]
    add edi, 4096
    dec ecx
    jnz 1b
2:
    PRINT "r"
    call put_hex
    jmp end_of_answer

scattered:
    call get_pages
    call get_u32
    push eax                                    # stride
    call get_u32
    mov ebp, eax                                # mask
    pop edx
    xor eax, eax
    xor esi, esi
    test ecx, ecx
    jz 2f
1:
    mov edi, esi
    and edi, ebp
    add edi, ebx
    shl edi, 12
    add eax, [edi]
    add esi, edx
    dec ecx
    jnz 1b
2:
    PRINT "s"
    call put_hex
    jmp end_of_answer

fill:
    call get_pages
    mov ebx, ecx
    mov ebp, edi
    call get_u32
    mov edx, eax                                # rounds
    xor eax, eax
    test ebx, ebx
    jz 3f
1:
    cmp eax, edx
    jae 3f
    mov edi, ebp
    mov esi, ebx
2:
    mov ecx, 1024
    rep stosd
    dec esi
    jnz 2b
    inc eax
    jmp 1b
3:
    PRINT "b"

end_of_answer:
    PRINT "\n"
    jmp next_command

quit:
    RESET

secondary:
    jmp park

    ROUTINES
