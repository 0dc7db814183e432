package finding

// Status is how bad a finding is.
type Status string

const (
	OK   Status = "ok"
	Warn Status = "warn" // works, but somebody should look at it
	Fail Status = "fail" // does not work
	Skip Status = "skip" // not looked at; the text says why
)

func (s Status) rank() int {
	switch s {
	case Skip:
		return 0
	case OK:
		return 1
	case Warn:
		return 2
	}
	return 3 // Fail, and whatever a newer gateway may send
}

// Worst returns the worse of two statuses; everything is worse than Skip.
func Worst(a, b Status) Status {
	if b.rank() > a.rank() {
		return b
	}
	return a
}

// ExitCode is what a tool ends with: 0 for OK and Skip, 1 for Warn, 2 for Fail.
func (s Status) ExitCode() int { return max(0, s.rank()-1) }

// Finding is what a tool has to say about one thing.
type Finding struct {
	Status Status `json:"status"`
	// Text names the thing and the cause.
	Text string `json:"text"`
	// Hints say what to do, most promising first.
	Hints []string `json:"hints,omitempty"`
	// Details are facts behind Text.
	Details map[string]string `json:"details,omitempty"`
	Table   *Table            `json:"table,omitempty"`
}

// Table shows several things of a kind. Every row has as many cells as there are columns.
type Table struct {
	Columns []string   `json:"columns"`
	Rows    [][]string `json:"rows"`
}

// Add appends a row.
func (t *Table) Add(cells ...string) { t.Rows = append(t.Rows, cells) }
