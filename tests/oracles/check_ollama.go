// Ollama's own reading of what `moejax export --format gguf` wrote: its Modelfile parser, its template, its GGUF reader.
// In a checkout of ollama (fb30760, 2026-08-21) as check/main.go, then: go build -o ollama-reads ./check
// ollama-reads FOLDER TALKS.json: prints the prompts of the talks ([[{"role", "content"}, …], …]) and what else it reads, as JSON.
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"

	"github.com/ollama/ollama/api"
	"github.com/ollama/ollama/fs/ggml"
	"github.com/ollama/ollama/parser"
	"github.com/ollama/ollama/template"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func main() {
	folder := os.Args[1]
	modelfile := must(parser.ParseFile(must(os.Open(filepath.Join(folder, "Modelfile")))))
	request := must(modelfile.CreateRequest(folder))
	var talks [][]api.Message
	if err := json.Unmarshal(must(os.ReadFile(os.Args[2])), &talks); err != nil {
		panic(err)
	}
	written := must(template.Parse(request.Template))
	prompts := []string{}
	for _, talk := range talks {
		var prompt bytes.Buffer
		if err := written.Execute(&prompt, template.Values{Messages: talk}); err != nil {
			panic(err)
		}
		prompts = append(prompts, prompt.String())
	}
	files := must(filepath.Glob(filepath.Join(folder, "*.gguf")))
	model := must(ggml.Decode(must(os.Open(files[0])), 0))
	json.NewEncoder(os.Stdout).Encode(map[string]any{
		"prompts": prompts, "parameters": request.Parameters, "files": len(request.Files),
		"architecture": model.KV().Architecture(), "type": model.KV().FileType().String(), "tensors": len(model.Tensors().Items()),
	})
}
