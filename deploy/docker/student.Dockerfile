# syntax=docker/dockerfile:1
# Trains students from published labels: no Ray, no teacher_service. Build from the repository's root:
#
#     docker build -f deploy/docker/student.Dockerfile -t essence-student:0.1.0 .
#     docker build -f deploy/docker/student.Dockerfile -t essence-student:0.1.0-cuda --build-arg TORCH=cuda .
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
# cpu or cuda
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/essence
WORKDIR /src
COPY constraints.txt ./
# A layer of its own: torch is most of the image and changes seldom. PyPI's wheel for Linux is that for CUDA.
RUN case "$TORCH" in \
        cpu) index="--index-url https://download.pytorch.org/whl/cpu" ;; \
        cuda) index="" ;; \
        *) echo "TORCH is cpu or cuda, found $TORCH" >&2; exit 1 ;; \
    esac \
    && /opt/essence/bin/pip install $index --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY schemas/softlabel_schemas schemas/softlabel_schemas
COPY student_trainer student_trainer
# The teachers' side stays out of the image; the build wants the folder that pyproject.toml names.
RUN mkdir teacher_service \
    && /opt/essence/bin/pip install --constraint constraints.txt ".[decode,s3]" \
    && rm /opt/essence/bin/teacher-service

FROM python:${PYTHON}
RUN useradd --create-home --uid 1000 --shell /bin/bash student
COPY --from=build /opt/essence /opt/essence
ENV PATH=/opt/essence/bin:$PATH \
    NUMBA_CACHE_DIR=/tmp/numba \
    MPLCONFIGDIR=/tmp/matplotlib
USER 1000
WORKDIR /home/student
CMD ["student-trainer", "--help"]
