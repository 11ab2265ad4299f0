"""llama.cpp's OpenAI-compatible server, for the tests: run by a Python that has the package `xllamacpp`.

    python endpoint_llama_cpp.py MODEL.gguf PORT

Prints its address once it serves (two requests at a time, one thread) and ends with its standard input.
"""

import sys

import xllamacpp


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path, params.port = sys.argv[1], int(sys.argv[2])
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 2048, 2, 0, 0
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
