ARG PYTHON_IMAGE=python:3.13-slim
FROM ${PYTHON_IMAGE}
RUN python -m pip install --no-cache-dir --root-user-action=ignore --disable-pip-version-check uv
COPY requirements.lock /
RUN uv pip install --system --no-cache --constraint /requirements.lock 'moto[s3]' flask flask-cors
CMD ["moto_server", "--host", "0.0.0.0", "--port", "9000"]
