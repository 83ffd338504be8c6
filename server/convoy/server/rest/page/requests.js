// The request for the chosen model and image, to be sent from elsewhere.

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// `target` has the addresses url, grpc, the name of the model, its version or "", the image's name,
// and whether the server uses TLS and wants a token.
function curl({ url, model, version, image, secured }) {
  const path = `v2/models/${encodeURIComponent(model)}${version ? `/versions/${version}` : ""}/infer`;
  return `image=${quoted(image)}
size=$(wc -c < "$image")
json='{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1],
  "parameters": {"binary_data_size": '$((size + 4))'}}],
  "outputs": [{"name": "probabilities", "parameters": {"classification": 5, "binary_data": false}}]}'
# The JSON, four bytes of length (little-endian), and the file.
{
  printf %s "$json"
  for shift in 0 8 16 24; do printf "\\\\$(printf %03o $((size >> shift & 255)))"; done
  cat "$image"
} | curl ${quoted(url + path)} --data-binary @- \\
  -H "Inference-Header-Content-Length: \${#json}"${secured ? ` \\
  -H "Authorization: Bearer $CONVOY_TOKEN"` : ""}
`;
}

function python({ grpc, model, version, image, tls, secured }) {
  const options = [tls && "tls=Tls()", secured && 'token=os.environ["CONVOY_TOKEN"]'].filter(Boolean);
  const names = ["Client", options.length && "ConnectionOptions", tls && "Tls"].filter(Boolean);
  const given = options.length ? `, options=ConnectionOptions(${options.join(", ")})` : "";
  const number = version ? `, version=${version}` : "";
  return `${secured ? "import os\n\n" : ""}from convoy.client import ${names.join(", ")}

with Client(${JSON.stringify(grpc)}${given}) as client:
    answer = client.classify(${JSON.stringify(image)}, model=${JSON.stringify(model)}${number}, top_k=5)
    for found in answer.classes:
        print(found.label, found.probability)
`;
}

function grpcurl({ grpc, model, version, image, tls, secured }) {
  const number = version ? `, "version": ${version}` : "";
  const flags = [!tls && "-plaintext", secured && '-H "authorization: Bearer $CONVOY_TOKEN"'].filter(Boolean);
  return `image=${quoted(image)}
printf '{"model": %s${number}, "top_k": 5, "encoded": "%s"}' \\
  ${quoted(JSON.stringify(model))} "$(base64 < "$image" | tr -d '\\n')" |
  grpcurl ${[...flags, "-d @"].join(" ")} ${grpc} \\
    convoy.v1.ClassifierService/Classify
`;
}

export const LANGUAGES = { curl, Python: python, grpcurl };
