"""Certificates of a test's own, by openssl: authorities, and what they sign."""

import pathlib
import subprocess


def _openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Authority:
    """PEM files in `directory`: its own NAME.pem, and of each that it signs NAME.pem, NAME.key."""

    def __init__(self, directory, name="ca"):
        self.directory, self.name = pathlib.Path(directory), name
        self.pem, self._key = self._files(name)
        self._new_key(self._key)
        _openssl("req", "-x509", "-key", self._key, "-subj", f"/CN={name}", "-days", 30,
                 "-out", self.pem)

    def sign(self, name, names="IP:127.0.0.1,DNS:localhost", days=30):
        """(certificate, key). names: subjectAltName. days: that it is good for; -1: it has
        expired."""
        pem, key = self._files(name)
        request, extension = (self.directory / f"{name}.{end}" for end in ("csr", "ext"))
        self._new_key(key)
        extension.write_text(f"subjectAltName={names}\n")
        _openssl("req", "-new", "-key", key, "-subj", f"/CN={name}", "-out", request)
        _openssl("x509", "-req", "-in", request, "-CA", self.pem, "-CAkey", self._key,
                 "-CAcreateserial", "-days", days, "-extfile", extension, "-out", pem)
        return pem, key

    def _files(self, name):
        return self.directory / f"{name}.pem", self.directory / f"{name}.key"

    @staticmethod
    def _new_key(path):
        _openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", path)
