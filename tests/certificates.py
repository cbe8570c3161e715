"""Certificates for one test, made with openssl: authorities, and what they have signed."""

import pathlib
import subprocess


class Authority:
    """A CA of its own, and the certificates that it signs, all in one directory."""

    def __init__(self, directory, name="ca"):
        self.directory = pathlib.Path(directory)
        self.name = name
        key = self.directory / f"{name}.key"
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-keyout", key, "-out", self.pem, "-days", "30", "-subj", f"/CN={name}",
                "-addext", "basicConstraints=critical,CA:TRUE")

    @property
    def pem(self):
        return self.directory / f"{self.name}.pem"

    def sign(self, name, names="DNS:localhost,IP:127.0.0.1", days=30, common_name=None):
        """(certificate, key) as paths. names: subjectAltName; days below 0: it has expired;
        common_name: default name."""
        cert, key, request = (self.directory / f"{name}.{end}" for end in ("pem", "key", "csr"))
        subject = f"/CN={name if common_name is None else common_name}"
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-keyout", key, "-out", request, "-subj", subject)
        extensions = self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        openssl("x509", "-req", "-in", request, "-CA", self.pem,
                "-CAkey", self.directory / f"{self.name}.key", "-CAcreateserial", "-out", cert,
                "-days", str(days), "-extfile", extensions)
        return cert, key


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
