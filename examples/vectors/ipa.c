/* Invariant point attention (Jumper et al. 2021, Suppl. Algorithm 22) on test vectors, in C99 without libraries.
 *
 *     ipa-parity vectors vectors --preset alphafold2
 *     cc -std=c99 -O2 -o ipa examples/vectors/ipa.c -lm && mkdir mine
 *     ./ipa vectors/random_frames.float64.safetensors mine/random_frames.float64.safetensors
 *     ipa-parity check --outputs mine --vectors vectors
 *
 * It reads one file, computes in double, and writes `out` in the file's dtype. Parameters have AlphaFold's monomer
 * layout, with a pair representation. The machine must be little-endian, as .safetensors is. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EPSILON 1e-8 /* of the lengths: norm_epsilon in manifest.json */

static char *header, *data;
static uint64_t header_size, data_size;

static void fail(const char *what, const char *which) {
    fprintf(stderr, "ipa: %s: %s\n", what, which);
    exit(2);
}

static void *allocate(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) fail("expected more memory", "calloc failed");
    return memory;
}

/* A .safetensors file: the header's size in 8 bytes, a JSON header, then the data. */
static void open_file(const char *path) {
    FILE *file = fopen(path, "rb");
    long size;
    if (!file || fseek(file, 0, SEEK_END) || (size = ftell(file)) < 8) fail("expected a .safetensors file", path);
    rewind(file);
    if (fread(&header_size, 8, 1, file) != 1 || header_size > (uint64_t)size - 8) fail("damaged header", path);
    data_size = (uint64_t)size - 8 - header_size;
    header = allocate(header_size + 1, 1);
    data = allocate(data_size, 1);
    if (fread(header, 1, header_size, file) != header_size || fread(data, 1, data_size, file) != data_size)
        fail("cannot read", path);
    fclose(file);
}

/* One array as doubles; its axes go to shape[8]. The writer of these files puts no spaces into the header. */
static double *array(const char *name, int *axes, long shape[8], char dtype[8]) {
    char key[128];
    unsigned long long first, last;
    snprintf(key, sizeof key, "\"%s\":{\"dtype\":\"", name);
    char *at = strstr(header, key);
    if (!at || sscanf(at + strlen(key), "%7[A-Z0-9]", dtype) != 1) fail("expected an array", name);
    if (!(at = strstr(at, "\"shape\":["))) fail("expected a shape", name);
    size_t count = 1, width = strcmp(dtype, "F64") == 0 ? 8 : strcmp(dtype, "F32") == 0 ? 4 : 1;
    if (width == 1 && strcmp(dtype, "BOOL")) fail("expected F64, F32 or BOOL", name);
    for (at += 9, *axes = 0; *at != ']' && *axes < 8; at += *at == ',') count *= shape[(*axes)++] = strtol(at, &at, 10);
    if (!(at = strstr(at, "\"data_offsets\":[")) || sscanf(at + 16, "%llu,%llu", &first, &last) != 2 ||
        last > data_size || last < first || last - first != count * width)
        fail("damaged offsets", name);
    double *result = allocate(count, sizeof(double));
    for (size_t i = 0; i < count; i++) {
        float single;
        if (width == 8) memcpy(result + i, data + first + 8 * i, 8);
        if (width == 4) memcpy(&single, data + first + 4 * i, 4), result[i] = single;
        if (width == 1) result[i] = data[first + i] != 0;
    }
    return result;
}

static double *input(const char *name, long *last_axis) {
    int axes;
    long shape[8];
    char dtype[8];
    double *x = array(name, &axes, shape, dtype);
    *last_axis = axes ? shape[axes - 1] : 1;
    return x;
}

/* rows of x (rows, inputs) times weights (inputs, outputs), plus the bias. */
static double *linear(const double *x, long rows, long inputs, const char *module, long *outputs) {
    char name[128];
    long width;
    snprintf(name, sizeof name, "parameter/%s/weights", module);
    double *weights = input(name, outputs);
    snprintf(name, sizeof name, "parameter/%s/bias", module);
    double *bias = input(name, &width), *y = allocate(rows * *outputs, sizeof(double));
    for (long r = 0; r < rows; r++)
        for (long o = 0; o < *outputs; o++) {
            double sum = bias[o];
            for (long i = 0; i < inputs; i++) sum += x[r * inputs + i] * weights[i * *outputs + o];
            y[r * *outputs + o] = sum;
        }
    free(weights), free(bias);
    return y;
}

static double entry(const double *rotation, int row, int column) { return rotation[3 * row + column]; }

/* R x + t */
static void to_global(const double *rotation, const double *t, const double x[3], double y[3]) {
    for (int a = 0; a < 3; a++) {
        y[a] = t[a];
        for (int b = 0; b < 3; b++) y[a] += entry(rotation, a, b) * x[b];
    }
}

/* R^T (x - t) */
static void to_local(const double *rotation, const double *t, const double x[3], double y[3]) {
    for (int a = 0; a < 3; a++) {
        y[a] = 0;
        for (int b = 0; b < 3; b++) y[a] += entry(rotation, b, a) * (x[b] - t[b]);
    }
}

/* Points (n, 3, heads, number) of a projection, in the global frame as (n, heads, number, 3). */
static double *points(const double *x, long n, long heads, long number, const double *rotation, const double *t) {
    long per = heads * number;
    double *y = allocate(n * 3 * per, sizeof(double));
    for (long i = 0; i < n; i++)
        for (long p = 0; p < per; p++) {
            double local[3] = {x[i * 3 * per + p], x[i * 3 * per + per + p], x[i * 3 * per + 2 * per + p]};
            to_global(rotation + 9 * i, t + 3 * i, local, y + 3 * (i * per + p));
        }
    return y;
}

static void write_out(const char *path, const double *out, int axes, const long *shape, const char *dtype) {
    char text[512];
    size_t count = 1, width = strcmp(dtype, "F64") == 0 ? 8 : 4;
    int at = snprintf(text, sizeof text, "{\"out\":{\"dtype\":\"%s\",\"shape\":[", dtype);
    for (int a = 0; a < axes; a++) {
        at += snprintf(text + at, sizeof text - at, "%s%ld", a ? "," : "", shape[a]);
        count *= shape[a];
    }
    at += snprintf(text + at, sizeof text - at, "],\"data_offsets\":[0,%zu]}}", count * width);
    while (at % 8) text[at++] = ' ';
    uint64_t size = at;
    FILE *file = fopen(path, "wb");
    if (!file) fail("cannot write", path);
    fwrite(&size, 8, 1, file), fwrite(text, 1, size, file);
    for (size_t i = 0; i < count; i++) {
        float single = (float)out[i];
        fwrite(width == 8 ? (const void *)(out + i) : (const void *)&single, width, 1, file);
    }
    if (fclose(file)) fail("cannot write", path);
}

int main(int argc, char **argv) {
    if (argc != 3) fail("expected two arguments", "ipa INPUT.safetensors OUTPUT.safetensors");
    open_file(argv[1]);
    int axes;
    char dtype[8];
    long shape[8], H, c_s, c_z, n, three, wide_q, wide_kv, wide_qp, wide_kvp;
    double *single = array("input/single", &axes, shape, dtype), *mask = input("input/mask", &n);
    double *pair = input("input/pair", &c_z), *rotation = input("input/rotation", &three);
    double *t = input("input/translation", &three), *gamma = input("parameter/trainable_point_weights", &H);
    c_s = shape[axes - 1];
    long rows = 1;
    for (int a = 0; a < axes - 1; a++) rows *= shape[a];
    double *q = linear(single, rows, c_s, "q_scalar", &wide_q), *kv = linear(single, rows, c_s, "kv_scalar", &wide_kv);
    double *q_local = linear(single, rows, c_s, "q_point_local", &wide_qp);
    double *kv_local = linear(single, rows, c_s, "kv_point_local", &wide_kvp);
    double *bias = linear(pair, rows * n, c_z, "attention_2d", &H); /* line 4 */
    long C = wide_q / H, CKV = wide_kv / H, Cv = CKV - C, P = wide_qp / H / 3, PKV = wide_kvp / H / 3, Pv = PKV - P;
    long features = H * (Cv + 4 * Pv + c_z), offset = H * Cv, norms = offset + 3 * H * Pv, pairs = norms + H * Pv;
    double *qp = points(q_local, rows, H, P, rotation, t), *kvp = points(kv_local, rows, H, PKV, rotation, t);
    double *f = allocate(rows * features, sizeof(double)), *a = allocate(n, sizeof(double));
    for (long i = 0; i < rows; i++)
        for (long h = 0; h < H; h++) {
            long first = i / n * n; /* of this protein in the batch */
            double weight = log1p(exp(gamma[h])) * sqrt(2.0 / (9 * P)), largest = -INFINITY, sum = 0;
            for (long j = 0; j < n; j++) { /* line 7 */
                double dot = 0, distance = 0;
                for (long c = 0; c < C; c++) dot += q[(i * H + h) * C + c] * kv[((first + j) * H + h) * CKV + c];
                for (long x = 0; x < 3 * P; x++) {
                    double d = qp[(i * H + h) * 3 * P + x] - kvp[((first + j) * H + h) * 3 * PKV + x];
                    distance += d * d;
                }
                a[j] = sqrt(1.0 / 3) * (dot / sqrt((double)C) + bias[(i * n + j) * H + h] - 0.5 * weight * distance);
                if (!mask[first + j]) a[j] -= 1e5;
                largest = fmax(largest, a[j]);
            }
            for (long j = 0; j < n; j++) sum += a[j] = exp(a[j] - largest);
            double *row = f + i * features;
            for (long j = 0; j < n; j++) a[j] /= sum;
            for (long j = 0; j < n; j++) { /* lines 8 and 9 */
                for (long c = 0; c < Cv; c++) row[h * Cv + c] += a[j] * kv[((first + j) * H + h) * CKV + C + c];
                for (long c = 0; c < c_z; c++) row[pairs + h * c_z + c] += a[j] * pair[(i * n + j) * c_z + c];
            }
            for (long p = 0; p < Pv; p++) { /* line 10 */
                double global[3] = {0}, local[3];
                for (long j = 0; j < n; j++)
                    for (int x = 0; x < 3; x++)
                        global[x] += a[j] * kvp[(((first + j) * H + h) * PKV + P + p) * 3 + x];
                to_local(rotation + 9 * i, t + 3 * i, global, local);
                for (int x = 0; x < 3; x++) row[offset + (x * H + h) * Pv + p] = local[x];
                row[norms + h * Pv + p] =
                    sqrt(local[0] * local[0] + local[1] * local[1] + local[2] * local[2] + EPSILON);
            }
        }
    double *out = linear(f, rows, features, "output_projection", &c_s); /* line 11 */
    write_out(argv[2], out, axes, shape, dtype);
    return 0;
}
