# syntax=docker/dockerfile:1
# Labels: teacher-service, every kind of teacher, and Ray. Build from the repository's root:
#
#     docker build -f deploy/docker/teacher.Dockerfile -t essence-teacher:0.1.0 .
#     docker build -f deploy/docker/teacher.Dockerfile -t essence-teacher:0.1.0-cuda --build-arg TORCH=cuda .
#
# The wheel of torch for CUDA brings CUDA's libraries along: the image needs no CUDA base, the node only the driver.
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
COPY teacher_service teacher_service
COPY student_trainer student_trainer
# Ray's launcher on AWS asks for boto3, of the version of s3fs' botocore.
RUN /opt/essence/bin/pip install --constraint constraints.txt ".[hf,s3]" \
    && /opt/essence/bin/pip install --constraint constraints.txt \
        "boto3==$(/opt/essence/bin/python -c 'import botocore; print(botocore.__version__)')"

FROM python:${PYTHON}
# Ray's head and autoscaler look for procps and wget; its launcher copies files into a running container with rsync, and the head
# starts workers through ssh. Triton compiles the launcher of its kernels with a C compiler, on the first batch on a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev openssh-client procps rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --shell /bin/bash ray
COPY --from=build /opt/essence /opt/essence
ENV PATH=/opt/essence/bin:$PATH \
    NUMBA_CACHE_DIR=/tmp/numba \
    RAY_USAGE_STATS_ENABLED=0
# The launcher runs every command in a login shell, where Debian's /etc/profile replaces the PATH from above.
RUN echo 'PATH=/opt/essence/bin:$PATH' > /etc/profile.d/essence.sh
USER 1000
WORKDIR /home/ray
CMD ["teacher-service", "--help"]
