/*
 * The native executable's only act: hand the call to the resident process, or else execute the Python executable.
 *
 * It does what handover.py does, without the start of an interpreter. That module has the protocol, and its constants:
 * native.py prints them as options of the compiler. Here no JSON is read, and nothing decided about a call: what is
 * unusual is left to the Python executable, which gets the standard input that was read already.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
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
enum { NOT_RUN = -1 }; /* in the place of a status */
enum { CHUNK = 1 << 16, MOST_READ = LARGEST_INPUT + CHUNK };
#define LENGTH(array) (sizeof(array) / sizeof *(array))

struct text {
    char *start;
    size_t size;
};

union ancillary { /* descriptors that go with a message */
    char space[CMSG_SPACE(DESCRIPTORS * sizeof(int))];
    struct cmsghdr header;
};

__attribute__((used)) static const char installation_mark[] = "\n" INSTALLATION_MARK "\n"; /* for install.sh */
static const char *const python[] = {PYTHON}; /* the Python executable, as a command */
static const char *const environment[][2] = {ENVIRONMENT {NULL, NULL}}; /* of Python: names and values, NULL for none */
static const char *const commands[] = {COMMANDS};
static const char *const variables[] = {VARIABLES};

/*
 * Return a path that begins with "./" as one below the directory in whose bin/ this executable lies, empty if that cannot
 * be told; other texts as they are.
 */
static const char *located(const char *path)
{
    char directory[PATH_MAX] = "", *end = directory, *whole;
    if (strncmp(path, "./", 2))
        return path;
    if (readlink("/proc/self/exe", directory, sizeof directory - 1) < 0)
        return "";
    for (int names = 0; names < 2 && (end = strrchr(directory, '/')); names++)
        *end = 0;
    if (!end)
        return "";
    return asprintf(&whole, "%s%s", directory, path + 1) < 0 ? "" : whole;
}

static const char *value_of(const char *name)
{
    const char *value = getenv(name);
    return value ? value : "";
}

static bool is_plain(const char *name)
{
    static const char letters[] = "_-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    return *name && !strchr("_-.", *name) && !name[strspn(name, letters)];
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

/*
 * End as the Python executable. If a status is given, it only withdraws the call, whose result could not be written;
 * otherwise it runs the call. The error is the one with which writing or reading has ended, 0 if there was none.
 */
static _Noreturn void execute_python(int argc, char **argv, const char *status, int error)
{
    char number[16], message[1024];
    const char **arguments = calloc(LENGTH(python) + (size_t)argc + 5, sizeof *arguments);
    if (arguments) {
        size_t count = 0;
        snprintf(number, sizeof number, "%d", error);
        while (count < LENGTH(python)) {
            arguments[count] = located(python[count]);
            count++;
        }
        arguments[count++] = NATIVE;
        arguments[count++] = (const char *)getauxval(AT_EXECFN);
        arguments[count++] = status;
        arguments[count++] = number;
        for (int given = 1; given < argc; given++)
            arguments[count++] = argv[given];
        for (size_t variable = 0; environment[variable][0]; variable++)
            if (environment[variable][1])
                setenv(environment[variable][0], located(environment[variable][1]), 1);
            else
                unsetenv(environment[variable][0]);
        execv(*arguments, (char *const *)arguments);
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
    if (connection > STDERR_FILENO && !connect(connection, (struct sockaddr *)&address, sizeof address))
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

/* Make memory for standard input that this process alone has, and that can become its standard input again. */
static bool make_input(int *memory, struct text *text)
{
    *memory = memfd_create("input", MFD_CLOEXEC);
    if (*memory < 0 || ftruncate(*memory, MOST_READ))
        return false;
    text->start = mmap(NULL, MOST_READ, PROT_READ | PROT_WRITE, MAP_SHARED, *memory, 0);
    return text->start != MAP_FAILED;
}

/* Read at most one chunk more than the largest input; false where that fails. */
static bool read_input(struct text *text)
{
    ssize_t more = 0;
    while (text->size <= LARGEST_INPUT && (more = read(STDIN_FILENO, text->start + text->size, CHUNK)) > 0)
        text->size += (size_t)more;
    return more >= 0;
}

static void give_input_back(int memory, struct text text)
{
    if (ftruncate(memory, (off_t)text.size) || dup2(memory, STDIN_FILENO) != STDIN_FILENO)
        close(STDIN_FILENO); /* the Python executable then says that it cannot be read */
}

static bool send_request(int connection, const int *descriptors)
{
    char netns_file[64] = "";
    struct stat netns;
    const char *module = located(MODULE);
    struct iovec parts[3 + 2 * LENGTH(variables)] = {
        {IDENTITY, sizeof IDENTITY - 1}, {(char *)module, strlen(module) + 1} /* the NUL after it included */
    };
    size_t count = 2;
    if (!stat(value_of("CNI_NETNS"), &netns))
        snprintf(netns_file, sizeof netns_file, "%llu:%llu", (unsigned long long)netns.st_dev, (unsigned long long)netns.st_ino);
    parts[count++] = (struct iovec){netns_file, strlen(netns_file)};
    for (size_t number = 0; number < LENGTH(variables); number++) {
        char *value = getenv(variables[number]);
        if (value) {
            char *entry = value - strlen(variables[number]) - 1; /* NAME=value, as it stands in environ(7) */
            parts[count++] = (struct iovec){"", 1};
            parts[count++] = (struct iovec){entry, strlen(entry)};
        }
    }
    union ancillary ancillary = {.header = {
        .cmsg_len = CMSG_LEN(DESCRIPTORS * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS
    }};
    memcpy(CMSG_DATA(&ancillary.header), descriptors, DESCRIPTORS * sizeof(int));
    struct msghdr message = {
        .msg_iov = parts, .msg_iovlen = count, .msg_control = &ancillary, .msg_controllen = sizeof ancillary.space
    };
    return sendmsg(connection, &message, 0) >= 0;
}

static bool is_readable(int descriptor, int milliseconds)
{
    struct pollfd event = {.fd = descriptor, .events = POLLIN};
    return poll(&event, 1, milliseconds) == 1;
}

/* Receive the first answer: return its size, and the descriptor of the process that takes the call, or -1. */
static ssize_t receive_taken(int connection, int *process_descriptor)
{
    char answer[sizeof TAKEN - 1];
    struct iovec place = {answer, sizeof answer};
    union ancillary ancillary;
    struct msghdr message = {
        .msg_iov = &place, .msg_iovlen = 1, .msg_control = &ancillary, .msg_controllen = CMSG_SPACE(sizeof(int))
    };
    ssize_t size = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *found = size == sizeof answer && !memcmp(answer, TAKEN, sizeof answer) ? CMSG_FIRSTHDR(&message) : NULL;
    *process_descriptor = -1;
    if (found && found->cmsg_type == SCM_RIGHTS && found->cmsg_len == CMSG_LEN(sizeof(int)))
        memcpy(process_descriptor, CMSG_DATA(found), sizeof(int));
    return size;
}

/* Ask for the call to be run with these descriptors, and return its status, NOT_RUN if it is not run. */
static int run_elsewhere(int connection, const int *descriptors)
{
    char answer[sizeof AT_WORK - 1];
    int process_descriptor;
    if (!send_request(connection, descriptors))
        return NOT_RUN;
    bool in_time = is_readable(connection, UNTIL_TAKEN) && receive_taken(connection, &process_descriptor) >= 0;
    if (!in_time) {
        shutdown(connection, SHUT_RDWR);
        receive_taken(connection, &process_descriptor);
    }
    if (process_descriptor < 0)
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
    if (!syscall(SYS_pidfd_send_signal, process_descriptor, SIGKILL, NULL, 0))
        is_readable(process_descriptor, -1); /* which it is once it is dead */
    return NOT_RUN;
}

/* Map the memory of a stream; false where that fails. */
static bool map_memory(int memory, struct text *text)
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
    int connection, descriptors[DESCRIPTORS], memory, status = NOT_RUN;
    struct text given = {.size = 0}, out, log;
    signal(SIGPIPE, SIG_IGN); /* a write that would raise one of them fails with an error instead, as in Python */
    signal(SIGXFSZ, SIG_IGN);
    if (!can_be_handed_over() || (connection = connect_to_resident()) < 0 || !make_descriptors(descriptors) ||
        !make_input(&memory, &given))
        execute_python(argc, argv, "", 0);
    if (!read_input(&given))
        execute_python(argc, argv, "", errno);
    if (given.size <= LARGEST_INPUT && write_all(descriptors[STDIN], given) && !lseek(descriptors[STDIN], 0, SEEK_SET))
        status = run_elsewhere(connection, descriptors);
    if (status == NOT_RUN || !map_memory(descriptors[STDERR], &log) || !map_memory(descriptors[STDOUT], &out)) {
        close(connection);
        give_input_back(memory, given);
        execute_python(argc, argv, "", 0);
    }
    write_all(STDERR_FILENO, log); /* no call fails because nobody listens */
    if (!write_all(STDOUT_FILENO, out)) {
        int error = errno;
        if (status)
            write_all(STDERR_FILENO, out); /* a runtime shows it where there is no error JSON */
        give_input_back(memory, given);
        execute_python(argc, argv, status ? "1" : "0", error);
    }
    _exit(status);
}
