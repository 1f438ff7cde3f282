/* Stands in for pyxis where there are no containers: accepts its options for srun, makes the mounts and the working directory
 * real, and keeps the host's root instead of unpacking an image. So a script for containers runs unchanged on slurm/lab.
 * Like pyxis it fails when a mount's source does not exist. PYXIS_STANDIN_IMAGE tells the task which image was asked for.
 *   gcc -shared -fPIC -Wall -o pyxis_standin.so pyxis_standin.c        (headers: libslurm-dev) */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis_standin, 1);

enum { IGNORED, IMAGE, MOUNTS, WORKDIR };
static char *given[4];

static int keep(int which, const char *value, int remote) {
    (void)remote;
    given[which] = value ? strdup(value) : NULL;
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "accepted, not unpacked", 1, IMAGE, keep},
    {"container-mounts", "SOURCE:TARGET[:ro],...", "bind mounts", 1, MOUNTS, keep},
    {"container-workdir", "PATH", "working directory", 1, WORKDIR, keep},
    {"no-container-mount-home", NULL, "accepted", 0, IGNORED, keep},
    SPANK_OPTIONS_TABLE_END};

int slurm_spank_init(spank_t spank, int count, char **values) {
    (void)count, (void)values;
    for (struct spank_option *option = options; option->name; option++)
        if (spank_option_register(spank, option) != ESPANK_SUCCESS) return -1;
    return 0;
}

static int make_folder(const char *path) {
    char part[4096];
    snprintf(part, sizeof part, "%s", path);
    for (char *s = part + 1; *s; s++)
        if (*s == '/') *s = 0, mkdir(part, 0755), *s = '/';
    return mkdir(part, 0755) && errno != EEXIST ? -1 : 0;
}

static int bind_folder(char *mount_) {
    char *source = mount_, *target = strchr(mount_, ':');
    if (target) *target++ = 0;
    else target = source;
    char *flags = strchr(target, ':');
    if (flags) *flags++ = 0;
    struct stat found;
    if (stat(source, &found)) {
        slurm_error("pyxis stand-in: couldn't mount %s: %m", source);
        return -1;
    }
    if (!strcmp(source, target)) return 0;
    if (make_folder(target) || mount(source, target, NULL, MS_BIND | MS_REC, NULL)) {
        slurm_error("pyxis stand-in: %s on %s: %m", source, target);
        return -1;
    }
    if (flags && strstr(flags, "ro")) mount("none", target, NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL);
    return 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int count, char **values) {
    (void)spank, (void)count, (void)values;
    if (!given[IMAGE]) return 0;
    if (unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL)) return -1;
    char *rest = NULL, *all = given[MOUNTS] ? strdup(given[MOUNTS]) : NULL;
    for (char *one = all ? strtok_r(all, ",", &rest) : NULL; one; one = strtok_r(NULL, ",", &rest))
        if (bind_folder(one)) return -1;
    return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **values) {
    (void)count, (void)values;
    if (!given[IMAGE]) return 0;
    spank_setenv(spank, "PYXIS_STANDIN_IMAGE", given[IMAGE], 1);
    return given[WORKDIR] && chdir(given[WORKDIR]) ? -1 : 0;
}
