# An image with the program and nothing else. By default the program is compiled in a stage of its own:
#
#     docker build -t pgonce .
#
# Where `cargo build --release` has made it already, on a system whose C library is not newer than the image's, take that:
#
#     docker build -t pgonce --target prebuilt .
#
# RUST_IMAGE and BASE_IMAGE name other images to build in and on, say from a registry of yours.

ARG RUST_IMAGE=rust:1-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS base
# A number, so that whoever runs the image can see that it is not root.
USER 65532:65532
ENTRYPOINT ["/usr/local/bin/pgonce"]
CMD ["--help"]

FROM base AS prebuilt
COPY target/release/pgonce /usr/local/bin/pgonce

FROM ${RUST_IMAGE} AS compiled
WORKDIR /src
COPY . .
RUN cargo build --locked --release --bin pgonce

FROM base
COPY --from=compiled /src/target/release/pgonce /usr/local/bin/pgonce
# Whom to trust when a webhook is sent. Without the stage above, mount such a file, and name it in SSL_CERT_FILE.
COPY --from=compiled /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
