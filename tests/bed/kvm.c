/* Shows that the bed's /dev/kvm runs a guest: ten bytes in real mode, which write to
 * memory and to a port and halt. Static and without a library for KVM, so that it
 * tells a broken bed from a broken program. Prints what it checked; exits with 0 if
 * all of it holds.
 *
 *     gcc -static -O2 -o kvm tests/bed/kvm.c
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static int check(const char *what, int result) {
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

static void expect(const char *what, long got, long wanted) {
    if (got != wanted) {
        fprintf(stderr, "%s: %ld, expected %ld\n", what, got, wanted);
        exit(1);
    }
}

int main(void) {
    static const unsigned char code[] = {
        0xc6, 0x06, 0x00, 0x20, 0x2a, /* mov byte [0x2000], 42 */
        0xb0, 0x55,                   /* mov al, 0x55 */
        0xe6, 0x10,                   /* out 0x10, al */
        0xf4,                         /* hlt */
    };
    int kvm = check("open /dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
    expect("API version", check("KVM_GET_API_VERSION", ioctl(kvm, KVM_GET_API_VERSION, 0)), KVM_API_VERSION);
    int vm = check("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));

    unsigned char *memory = mmap(NULL, 0x4000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        check("mmap", -1);
    memcpy(memory + 0x1000, code, sizeof code);
    struct kvm_userspace_memory_region region = {
        .memory_size = 0x4000,
        .userspace_addr = (unsigned long)memory,
    };
    check("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));

    int vcpu = check("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, 0));
    int size = check("KVM_GET_VCPU_MMAP_SIZE", ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        check("mmap of the vCPU", -1);
    struct kvm_sregs sregs;
    check("KVM_GET_SREGS", ioctl(vcpu, KVM_GET_SREGS, &sregs));
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    check("KVM_SET_SREGS", ioctl(vcpu, KVM_SET_SREGS, &sregs));
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    check("KVM_SET_REGS", ioctl(vcpu, KVM_SET_REGS, &regs));

    check("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
    expect("first exit", run->exit_reason, KVM_EXIT_IO);
    expect("port", run->io.port, 0x10);
    expect("byte written to the port", *((unsigned char *)run + run->io.data_offset), 0x55);
    check("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
    expect("second exit", run->exit_reason, KVM_EXIT_HLT);
    expect("byte written to memory", memory[0x2000], 42);

    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    const int rounds = 1000;
    for (int round = 0; round < rounds; round++) {
        check("KVM_SET_REGS", ioctl(vcpu, KVM_SET_REGS, &regs));
        check("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
        expect("exit of a round", run->exit_reason, KVM_EXIT_IO);
        check("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("a guest wrote to memory and to a port and halted; %.0f us an exit\n",
           ((end.tv_sec - start.tv_sec) * 1e6 + (end.tv_nsec - start.tv_nsec) / 1e3) / (2 * rounds));
    return 0;
}
