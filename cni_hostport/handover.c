/*
 * The native executable's only act: hand the call to the resident process, or else execute the Python executable.
 *
 * It does what handover.py does, without the start of an interpreter. That module has the protocol, and its constants:
 * native.py prints them as options of the compiler. Here is neither JSON nor nftables nor a decision about a call: what
 * is unusual is left to the Python executable, which gets the standard input that was read already.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

enum { STDIN, STDOUT, STDERR, CALLER, DESCRIPTORS };
enum { CHUNK = 1 << 16, NOT_RUN = -1, LAST_STREAM = 2 };
#define LENGTH(array) (sizeof(array) / sizeof *(array))

struct text {
    char *start;
    size_t size;
};

union rights { /* descriptors that go with a message */
    char space[CMSG_SPACE(DESCRIPTORS * sizeof(int))];
    struct cmsghdr header;
};

__attribute__((used)) static const char installation_mark[] = "\n" INSTALLATION_MARK EXECUTABLE "\n"; /* for install.sh */
static const char *const commands[] = {COMMANDS};
static const char *const variables[] = {VARIABLES};
static char input[LARGEST_INPUT + CHUNK];

static const char *value_of(const char *name)
{
    const char *value = getenv(name);
    return value ? value : "";
}

static bool is_plain(const char *name)
{
    if (!isalnum((unsigned char)*name))
        return false;
    for (; *name; name++)
        if (!isalnum((unsigned char)*name) && !strchr("_-.", *name))
            return false;
    return true;
}

/* Tell whether the call is a frequent one, and not one that is refused before its standard input is read. */
static bool can_be_handed_over(void)
{
    const char *command = value_of("CNI_COMMAND"), *ifname = value_of("CNI_IFNAME");
    bool is_frequent = false;
    for (size_t number = 0; number < LENGTH(commands); number++)
        is_frequent |= !strcmp(command, commands[number]);
    return is_frequent && is_plain(value_of("CNI_CONTAINERID")) && is_plain(ifname) && strlen(ifname) <= LONGEST_IFNAME &&
           *value_of("CNI_PATH") && (*value_of("CNI_NETNS") || !strcmp(command, "DEL"));
}

/* Write all of a text; false, with errno, where that fails. */
static bool write_all(int target, struct text text)
{
    while (text.size) {
        ssize_t written = write(target, text.start, text.size);
        if (written < 0)
            return false;
        text.start += written;
        text.size -= (size_t)written;
    }
    return true;
}

/* End as the Python executable. With a status, that only withdraws the call, whose result could not be written. */
static _Noreturn void execute_python(int argc, char **argv, const char *status, int error)
{
    char number[16], message[1024];
    const char **arguments = calloc((size_t)argc + 6, sizeof *arguments);
    if (arguments) {
        size_t count = 0;
        snprintf(number, sizeof number, "%d", error);
        arguments[count++] = EXECUTABLE;
        arguments[count++] = NATIVE;
        arguments[count++] = (const char *)getauxval(AT_EXECFN);
        arguments[count++] = status;
        arguments[count++] = number;
        for (int given = 1; given < argc; given++)
            arguments[count++] = argv[given];
        execv(EXECUTABLE, (char *const *)arguments);
    }
    int length = snprintf(message, sizeof message, CANNOT_START, strerror(errno));
    write_all(STDOUT_FILENO, (struct text){message, (size_t)length});
    _exit(1);
}

/* Return a connection to the resident process, negative if there is none, or a standard stream is closed. */
static int connect_to_resident(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(SOCKET) >= sizeof address.sun_path)
        return -1;
    memcpy(address.sun_path, SOCKET, strlen(SOCKET));
    int connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (connection > LAST_STREAM && !connect(connection, (struct sockaddr *)&address, sizeof address))
        return connection;
    return -1;
}

/* Make what both processes share: memory for the standard streams, and a descriptor of this process. */
static bool make_descriptors(int *descriptors)
{
    for (int stream = STDIN; stream <= STDERR; stream++)
        if ((descriptors[stream] = memfd_create("stream", MFD_CLOEXEC)) < 0)
            return false;
    return (descriptors[CALLER] = (int)syscall(SYS_pidfd_open, getpid(), 0)) >= 0;
}

/* Read at most one chunk more than the largest input; false where that fails. */
static bool read_input(struct text *text)
{
    ssize_t more = 1;
    while (text->size <= LARGEST_INPUT && (more = read(STDIN_FILENO, text->start + text->size, CHUNK)) > 0)
        text->size += (size_t)more;
    if (more < 0 && text->size)
        close(STDIN_FILENO); /* what was read is lost: let nobody take the rest for all */
    return more >= 0;
}

/* Make standard input what it was before it was read: from memory, or by a process where memory did not take it. */
static void give_input_back(int memory, struct text text)
{
    int ends[2];
    struct stat status;
    if (!fstat(memory, &status) && (size_t)status.st_size == text.size && !lseek(memory, 0, SEEK_SET) &&
        dup2(memory, STDIN_FILENO) == STDIN_FILENO)
        return;
    pid_t child = pipe2(ends, O_CLOEXEC) ? -1 : fork();
    if (!child) {
        for (int stream = STDIN_FILENO; stream <= LAST_STREAM; stream++)
            close(stream); /* the caller waits until nobody has them */
        close(ends[0]);
        write_all(ends[1], text);
        _exit(0);
    }
    if (child < 0 || dup2(ends[0], STDIN_FILENO) != STDIN_FILENO)
        close(STDIN_FILENO); /* the Python executable then says that it cannot be read */
}

static bool send_request(int connection, const int *descriptors)
{
    char file[64] = "";
    struct stat netns;
    struct iovec parts[2 + 2 * LENGTH(variables)] = {{IDENTITY, sizeof IDENTITY}}; /* the NUL after it included */
    size_t count = 1;
    if (!stat(value_of("CNI_NETNS"), &netns))
        snprintf(file, sizeof file, "%llu:%llu", (unsigned long long)netns.st_dev, (unsigned long long)netns.st_ino);
    parts[count++] = (struct iovec){file, strlen(file)};
    for (size_t number = 0; number < LENGTH(variables); number++) {
        char *value = getenv(variables[number]);
        if (value) {
            char *entry = value - strlen(variables[number]) - 1; /* NAME=value, as it stands in environ(7) */
            parts[count++] = (struct iovec){"", 1};
            parts[count++] = (struct iovec){entry, strlen(entry)};
        }
    }
    union rights rights = {.header = {CMSG_LEN(DESCRIPTORS * sizeof(int)), SOL_SOCKET, SCM_RIGHTS}};
    memcpy(CMSG_DATA(&rights.header), descriptors, DESCRIPTORS * sizeof(int));
    struct msghdr message = {
        .msg_iov = parts, .msg_iovlen = count, .msg_control = &rights, .msg_controllen = sizeof rights.space
    };
    return sendmsg(connection, &message, 0) >= 0;
}

static bool is_readable(int descriptor, int milliseconds)
{
    struct pollfd event = {.fd = descriptor, .events = POLLIN};
    return poll(&event, 1, milliseconds) == 1;
}

/* Receive the first answer: return its size, and the descriptor of the process that takes the call, or -1. */
static ssize_t receive_taken(int connection, int *process)
{
    char answer[sizeof TAKEN - 1];
    struct iovec place = {answer, sizeof answer};
    union rights rights;
    struct msghdr message = {
        .msg_iov = &place, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = CMSG_SPACE(sizeof(int))
    };
    ssize_t size = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *found = size == sizeof answer && !memcmp(answer, TAKEN, sizeof answer) ? CMSG_FIRSTHDR(&message) : NULL;
    *process = -1;
    if (found && found->cmsg_type == SCM_RIGHTS && found->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(process, CMSG_DATA(found), sizeof(int));
    return size;
}

/* Ask for the call to be run with these descriptors, and return its status, NOT_RUN if it is not run. */
static int run_elsewhere(int connection, const int *descriptors)
{
    char answer[sizeof AT_WORK - 1];
    int process;
    if (!send_request(connection, descriptors))
        return NOT_RUN;
    bool in_time = is_readable(connection, UNTIL_TAKEN) && receive_taken(connection, &process) >= 0;
    if (!in_time) {
        shutdown(connection, SHUT_RDWR);
        receive_taken(connection, &process);
    }
    if (process < 0)
        return NOT_RUN;
    while (in_time && is_readable(connection, UNTIL_DONE)) {
        ssize_t size = recv(connection, answer, sizeof answer, 0);
        if (!size || (size < 0 && errno == ECONNRESET))
            return NOT_RUN; /* it is dead */
        if (size < 0)
            break;
        if (size != sizeof answer || memcmp(answer, AT_WORK, sizeof answer))
            return (unsigned char)answer[0];
    }
    if (!syscall(SYS_pidfd_send_signal, process, SIGKILL, NULL, 0))
        is_readable(process, -1); /* which it is once it is dead */
    return NOT_RUN;
}

/* Show what the call has written to a stream; false where that fails. */
static bool map(int memory, struct text *text)
{
    struct stat status;
    if (fstat(memory, &status))
        return false;
    text->size = (size_t)status.st_size;
    text->start = text->size ? mmap(NULL, text->size, PROT_READ, MAP_SHARED, memory, 0) : NULL;
    return text->start != MAP_FAILED;
}

int main(int argc, char **argv)
{
    int connection, descriptors[DESCRIPTORS], status = NOT_RUN;
    struct text given = {.start = input}, out, log;
    signal(SIGPIPE, SIG_IGN); /* both are errors of the call that meets them, as they are in Python */
    signal(SIGXFSZ, SIG_IGN);
    if (!can_be_handed_over() || (connection = connect_to_resident()) < 0 || !make_descriptors(descriptors) ||
        !read_input(&given))
        execute_python(argc, argv, "", 0);
    if (given.size <= LARGEST_INPUT && write_all(descriptors[STDIN], given) && !lseek(descriptors[STDIN], 0, SEEK_SET))
        status = run_elsewhere(connection, descriptors);
    if (status == NOT_RUN || !map(descriptors[STDERR], &log) || !map(descriptors[STDOUT], &out)) {
        give_input_back(descriptors[STDIN], given);
        execute_python(argc, argv, "", 0);
    }
    write_all(STDERR_FILENO, log); /* no call fails because nobody listens */
    if (!write_all(STDOUT_FILENO, out)) {
        int error = errno;
        if (status)
            write_all(STDERR_FILENO, out); /* a runtime shows it where there is no error JSON */
        give_input_back(descriptors[STDIN], given);
        execute_python(argc, argv, status ? "1" : "0", error);
    }
    _exit(status);
}
